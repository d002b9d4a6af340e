// The products of panels.h for one instruction set: included there once for each, with DX_PRODUCT,
// what adds the product of two vectors to a third.

// R rows of C, of N vectors of columns and, after them, half a vector where kTail.
template <int R, int N, bool kTail>
DX_PRODUCTS_TARGET void multiply_block(const PanelProduct& p, int64_t first) {
  constexpr int kEach = 3;  // rows that one pointer reaches: it, and once and twice the stride on
  constexpr int kPointers = (R + kEach - 1) / kEach;
  const Word* a[kPointers];
  const float* u = p.panel;
#pragma GCC unroll 4
  for (int i = 0; i < kPointers; ++i) a[i] = p.a + (first + i * kEach) * p.stride;
  Vector own[R][N + 1];  // N may be 0
  Half tail[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) own[r][n] = zero();
    if constexpr (kTail) tail[r] = half_of(zero());
  }
  for (int64_t c = 0; c < p.numbers; ++c, u += N * kWidth + (kTail ? kHalf : 0)) {
    Vector b[N + 1];
    Half of_tail;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) b[n] = load(u + n * kWidth);
    if constexpr (kTail) of_tail = load_half(u + N * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector number = broadcast(a[r / kEach][r % kEach * p.stride]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) own[r][n] = DX_PRODUCT(number, b[n], own[r][n]);
      if constexpr (kTail) tail[r] = DX_PRODUCT(half_of(number), of_tail, tail[r]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) ++a[i];
  }
  float* to = p.to + first * p.to_stride;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, to += p.to_stride) {
    const Vector shrink = broadcast(p.shrink == nullptr ? 0.0f : p.shrink[first + r]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* at = to + n * kWidth;
      store(at, p.shrink == nullptr ? own[r][n] : multiply_add(shrink, load(at), own[r][n]));
    }
    if constexpr (kTail) {
      float* at = to + N * kWidth;
      store(at,
            p.shrink == nullptr ? tail[r] : multiply_add(half_of(shrink), load_half(at), tail[r]));
    }
  }
}

// All rows, as many at once as there are registers for.
template <int N, bool kTail>
void multiply_panel_of(const PanelProduct& p) {
  constexpr int kMost = kPanelRows[N + kTail];
  int64_t r = 0;
  const auto take = [&](auto rows) {
    for (; r + rows <= p.count; r += rows) multiply_block<rows, N, kTail>(p, r);
  };
  take(std::integral_constant<int, kMost>());
  take(std::integral_constant<int, 4>());
  take(std::integral_constant<int, 1>());
}

inline void multiply_panel(const PanelProduct& p, int64_t width) {
  if constexpr (kHalf > 0)
    if (width % kWidth != 0) switch (width / kWidth) {
        case 0: return multiply_panel_of<0, true>(p);
        case 1: return multiply_panel_of<1, true>(p);
        default: return multiply_panel_of<2, true>(p);
      }
  switch (width / kWidth) {
    case 1: return multiply_panel_of<1, false>(p);
    case 2: return multiply_panel_of<2, false>(p);
    default: return multiply_panel_of<3, false>(p);
  }
}
