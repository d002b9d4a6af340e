"""What the ops are meant to reach on an H100 or H200: ratios between times of one run."""

from __future__ import annotations

import math

# Of the baseline's time, >= 64 MB a tensor.
FASTER = {
    "sampler_step: DDIM + clip, no noise": 4.8,
    "sampler_step: DDPM, noise made": 6.0,
    "sampler_step: DDPM + guidance, noise made": 6.5,
    "perturb: noise given": 2.3,
    "denoising_loss: epsilon, noise made": 2.3,
}

# Of a thread that makes noise and has 16 bytes of each tensor: machine instructions for sm_90
# (docs/kernels.md).
INSTRUCTIONS = {
    "sampler_step": {"float32": 425, "bfloat16": 744},
    "denoising_loss": {"float32": 680, "bfloat16": 864},
}


def reachable(row: dict) -> float:
    """The share of the copy's bandwidth at which there is time for the instructions of an op that
    makes noise, at most 1; in steps of 0.05, so that it is the same for the rows of a device."""
    instructions = INSTRUCTIONS.get(row["op"], {}).get(row["dtype"])
    if not instructions or "noise made" not in row["variant"] or not row.get("issue_rate"):
        return 1.0
    bandwidth = 2 * row["bytes"] / row["passes"] / (1e-6 * row["device_us"]["copy"])
    time_of_a_warp = 32 * 16 * row["passes"] / bandwidth
    return min(math.floor(20 * row["issue_rate"] * time_of_a_warp / instructions) / 20, 1.0)


def ratio(row: dict, other: str, times: str = "device_us") -> float | None:
    """How many times as long the other takes: "eager", "compiled"."""
    of, ours = row[times].get(other), row[times].get("fused")
    return of / ours if of and ours else None


def copy_percent(row: dict) -> float:
    """Of the bandwidth of a copy, by the bytes that have to be moved."""
    return 100 * row["passes"] / 2 / copies(row)


def copies(row: dict) -> float:
    """How many copies of x take as long."""
    return row["device_us"]["fused"] / row["device_us"]["copy"]


def judged(name: str, value: float | None, limit: float, least: bool = True) -> list[dict]:
    if value is None:  # not compiled, or not measured
        return []
    met = value >= limit if least else value <= limit
    sign = "≥" if least else "≤"
    return [{"target": name, "wanted": f"{sign} {limit:g}", "value": value, "met": met}]


def of_row(row: dict) -> list[dict]:
    """[{target, wanted, value, met}] of one measured row."""
    forward = row["op"] == "group_norm_act" and not row["backward"]
    if row["op"] == "group_norm_act":
        return norm_forward(row) if forward else norm_backward(row)
    if row["scale"] == "latent" and row["op"] == "sampler_step":
        eager, compiled = (ratio(row, other, "call_us") for other in ("eager", "compiled"))
        return [
            *judged("latents, a call: × eager", eager, 6),
            *judged("latents, a call: × compile", compiled, 1),
        ]
    if row["scale"] != "large":
        return []
    work, found, best = f"{row['op']}: {row['variant']}", [], reachable(row)
    if row["op"] in INSTRUCTIONS:
        made = "noise made" in row["variant"]
        source = f"noise made, {row['dtype']}" if made else "noise given or none"
        name = (
            f"{work}, {row['dtype']}" if row["op"] == "denoising_loss" else f"{row['op']}, {source}"
        )
        limit = min(100 * best, 90) if made else 95
        found += judged(f"{name}: % of copy", copy_percent(row), limit)
    if work in FASTER:
        dtype = f", {row['dtype']}" if best < 1 else ""
        found += judged(f"{work}{dtype}: × eager", ratio(row, "eager"), best * FASTER[work])
    return found


def norm_forward(row: dict) -> list[dict]:
    found = []
    if row["dtype"] != "float32":
        on_chip = row["plan"]["forward"]["kind"] == "on chip"
        kind, limit = ("on chip", 1.2) if on_chip else ("split", 1.6)
        found += judged(f"GroupNorm, 16 bits, {kind}: copies", copies(row), limit, least=False)
    eager = ratio(row, "eager")
    if row["groups"] * row["shape"][0] <= 64:
        found += judged("GroupNorm, N·groups <= 64: × eager", eager, 10)
    found += judged("GroupNorm, every shape: × eager", eager, 1)
    return found + judged("GroupNorm, every shape: × compile", ratio(row, "compiled"), 1)


def norm_backward(row: dict) -> list[dict]:
    return [
        *judged("GroupNorm, forward + backward: × eager", ratio(row, "eager"), 2.5),
        *judged("GroupNorm, forward + backward: copies", copies(row), 2.8, least=False),
    ]


def of_all(rows: list[dict]) -> list[dict]:
    """Those of several rows together."""
    found = []
    for dtype in ("float32", "bfloat16"):
        ratios = [
            ratio(row, "eager")
            for row in rows
            if row["op"] == "group_norm_act"
            and not row["backward"]
            and (row["dtype"], row["layout"]) == (dtype, "contiguous")
        ]
        if ratios and all(ratios):
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            name = f"GroupNorm, {dtype}: geometric mean of {len(ratios)} × eager"
            found += judged(name, mean, 3)
    same = {}
    for row in rows:
        key = (row["op"], row["variant"], row["scale"], tuple(row["shape"]), row["dtype"])
        same.setdefault(key, {})[row["layout"]] = row["device_us"]["fused"]
    for times in same.values():
        if len(times) == 2:
            value = times["channels_last"] / times["contiguous"]
            found += judged("channels_last / contiguous", value, 1.1, least=False)
    return found


def summary(rows: list[dict]) -> list[dict]:
    """One line a target: how many of its rows met it, and the worst."""
    measured = [row for row in rows if "error" not in row]
    every = [target for row in measured for target in row["targets"]] + of_all(measured)
    lines = {}
    for target in every:
        lines.setdefault((target["target"], target["wanted"]), []).append(target)
    found = []
    for (name, wanted), targets in lines.items():
        values = [target["value"] for target in targets]
        worst = min(values) if wanted.startswith("≥") else max(values)
        met = sum(target["met"] for target in targets)
        found.append(
            {"target": name, "wanted": wanted, "rows": len(values), "met": met, "worst": worst}
        )
    return found
