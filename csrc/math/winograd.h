// Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016, "Fast algorithms for convolutional
// neural networks"): a tile y of 4x4 outputs of a 3x3 filter g, from the 6x6 inputs d around it, in
// 36 products where the sum of products has 144:
//   y = A^T [(G g G^T) * (B^T d B)] A
// The matrices belong to the points 0, +-a, +-b and infinity. With the usual a = 1, b = 2 the
// largest error of 64 channels was 6 to 8 times that of a direct sum; with a = 1/b = 1/sqrt(2) it
// is 1 to 2 times that.
#pragma once

#include "portable.h"

namespace dx {

constexpr int kFilterSide = 3;
constexpr int kTileIn = 6, kTileOut = 4;
constexpr int kPoints = kTileIn * kTileIn;

constexpr double kPointB = 1.4142135623730951, kPointA = kPointB / 2;
constexpr double kWeightA = -1 / 1.5, kWeightB = 1.0 / 6;  // G's factors at +-a and +-b

// G g, in float64: made once, used for every tile.
DX_INLINE void winograd_filter(const double (&g)[kFilterSide], double (&u)[kTileIn]) {
  const double even_a = g[0] + g[2] / 2, odd_a = kPointA * g[1];
  const double even_b = g[0] + g[2] * 2, odd_b = kPointB * g[1];
  u[0] = g[0];
  u[1] = kWeightA * (even_a + odd_a);
  u[2] = kWeightA * (even_a - odd_a);
  u[3] = kWeightB * (even_b + odd_b);
  u[4] = kWeightB * (even_b - odd_b);
  u[5] = g[2];
}

// B^T d
DX_INLINE void winograd_input(const float (&d)[kTileIn], float (&v)[kTileIn]) {
  const float even_a = multiply_add(-2.0f, d[2], d[4]), odd_a = multiply_add(-2.0f, d[1], d[3]);
  const float even_b = multiply_add(-0.5f, d[2], d[4]), odd_b = multiply_add(-0.5f, d[1], d[3]);
  v[0] = multiply_add(-2.5f, d[2], d[0] + d[4]);
  v[1] = multiply_add(float(kPointA), odd_a, even_a);
  v[2] = multiply_add(float(-kPointA), odd_a, even_a);
  v[3] = multiply_add(float(kPointB), odd_b, even_b);
  v[4] = multiply_add(float(-kPointB), odd_b, even_b);
  v[5] = multiply_add(-2.5f, d[3], d[1] + d[5]);
}

// A^T m
DX_INLINE void winograd_output(const float (&m)[kTileIn], float (&y)[kTileOut]) {
  const float even_a = m[1] + m[2], odd_a = float(kPointA) * (m[1] - m[2]);
  const float even_b = m[3] + m[4], odd_b = float(kPointB) * (m[3] - m[4]);
  y[0] = m[0] + (even_a + even_b);
  y[1] = odd_a + odd_b;
  y[2] = multiply_add(0.5f, even_a, 2.0f * even_b);
  y[3] = multiply_add(0.5f, odd_a, multiply_add(2.0f, odd_b, m[5]));
}

// The gradient of g is G^T [sum of (B^T d B) * (A dy A^T)] G. These are A dy and, in float64, G^T
// u.
DX_INLINE void winograd_output_gradient(const float (&dy)[kTileOut], float (&m)[kTileIn]) {
  const float even_a = multiply_add(0.5f, dy[2], dy[0]), odd_a = multiply_add(0.5f, dy[3], dy[1]);
  const float even_b = multiply_add(2.0f, dy[2], dy[0]), odd_b = multiply_add(2.0f, dy[3], dy[1]);
  m[0] = dy[0];
  m[1] = multiply_add(float(kPointA), odd_a, even_a);
  m[2] = multiply_add(float(-kPointA), odd_a, even_a);
  m[3] = multiply_add(float(kPointB), odd_b, even_b);
  m[4] = multiply_add(float(-kPointB), odd_b, even_b);
  m[5] = dy[3];
}

DX_INLINE void winograd_filter_gradient(const double (&u)[kTileIn], double (&dg)[kFilterSide]) {
  const double even_a = kWeightA * (u[1] + u[2]), odd_a = kWeightA * (u[1] - u[2]);
  const double even_b = kWeightB * (u[3] + u[4]), odd_b = kWeightB * (u[3] - u[4]);
  dg[0] = u[0] + even_a + even_b;
  dg[1] = kPointA * odd_a + kPointB * odd_b;
  dg[2] = even_a / 2 + even_b * 2 + u[5];
}

}  // namespace dx
