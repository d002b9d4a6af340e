// One element of one sampler step; diffusion_ext/samplers/rows.py derives the coefficients.
#pragma once

#include "portable.h"

namespace dx {

// A row of the table is floats, in the order of its columns:
//   kx km | ax am a0 a1..aS az | (slot, bx bm b0 b1..bS bz) for each write | guidance, where it has
// x' is the combination a of x, m, x0, the slots 1..S and z; each write puts the combination b into
// a slot, which counts from 0. With one slot and no writes, the slot receives x0.
constexpr int kMostSlots = 6, kMostWrites = 2;

struct RowShape {
  int slots, writes;
  bool guided;

  DX_INLINE bool keeps_x0() const { return slots == 1 && writes == 0; }
  DX_INLINE int combination() const { return 4 + slots; }
  DX_INLINE int width() const { return 2 + combination() + writes * (1 + combination()) + guided; }
};

// The weights of x' or of a write. A weight of 0 reads nothing.
struct Combination {
  float x, m, x0, z;
  const float* slots;  // [S]
};

// A row, where it lies.
struct StepRow {
  const float* c;
  RowShape shape;

  DX_INLINE float kx() const { return c[0]; }
  DX_INLINE float km() const { return c[1]; }
  DX_INLINE float guidance(float otherwise) const {
    return shape.guided ? c[shape.width() - 1] : otherwise;
  }
  DX_INLINE Combination next() const { return at(2); }
  DX_INLINE Combination write(int i) const { return at(3 + shape.combination() + offset(i)); }
  // Where a write goes; below 0 nowhere: a row may have fewer than its table.
  DX_INLINE int slot(int i) const {
    const float slot = c[2 + shape.combination() + offset(i)];
    return slot >= 0.0f ? int(slot < kMostSlots ? slot : kMostSlots) : -1;
  }

  // Whether anything that the row makes has noise in it.
  DX_INLINE bool noisy() const {
    bool noisy = next().z != 0.0f;
    for (int i = 0; i < shape.writes; ++i) noisy = noisy || write(i).z != 0.0f;
    return noisy;
  }

 private:
  DX_INLINE int offset(int i) const { return i * (1 + shape.combination()); }
  DX_INLINE Combination at(int i) const {
    return {c[i], c[i + 1], c[i + 2], c[i + 3 + shape.slots], c + i + 3};
  }
};

// Classifier-free guidance (Ho & Salimans 2022, eq. 6). A scale of 1 is the conditional output, to
// the bit, so that the other need not be had.
DX_INLINE float guide(float uncond, float cond, float guidance) {
  return guidance == 1.0f ? cond : fma(guidance, cond - uncond, uncond);
}

// x0 = kx x + km m
DX_INLINE float predict_x0(float kx, float km, float x, float m) { return fma(kx, x, km * m); }

// x0 within [-limit, limit]. A NaN stays one, as in torch.clamp.
DX_INLINE float clip_x0(float x0, float limit) {
  return x0 < -limit ? -limit : (x0 > limit ? limit : x0);
}

// The sum of a combination's first terms: ax x + am m + a0 x0. The slots are added to it in their
// order, then the noise, each by an fma.
DX_INLINE float combine(const Combination& a, bool of_x0, float x, float m, float x0) {
  const float sum = fma(a.x, x, a.m * m);
  return of_x0 ? fma(a.x0, x0, sum) : sum;
}

}  // namespace dx
