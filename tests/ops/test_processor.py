"""The processor's name, by which choices are kept: as each system tells it."""

import platform
import subprocess
import sys

import pytest

from diffusion_ext.ops import choices

pytestmark = pytest.mark.backends("cpu")
X86 = "processor\t: 0\nmodel name\t: AMD EPYC \ncpu family\t: 26\nmodel\t\t: 2\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (X86, "AMD EPYC, family 26 model 2"),
        ("model name\t: Some Chip\n", "Some Chip"),
        (ARM, "aarch64, implementer 0x41 part 0xd0c"),
        ("processor\t: 0\n", "unnamed"),
        (None, "unnamed"),
    ],
)
def test_on_linux(monkeypatch, tmp_path, text, name):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(choices, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(platform, "processor", lambda: "unnamed")
    assert choices.processor.__wrapped__() == name


def test_on_macos(monkeypatch):
    def sysctl(command, **_):
        assert command == ("sysctl", "-n", "machdep.cpu.brand_string")
        return subprocess.CompletedProcess(command, 0, stdout="Apple M2\n")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", sysctl)
    assert choices.processor.__wrapped__() == "Apple M2"
