// The product of products.h for one instruction set: included there once for each, with
// DX_PRODUCTS_TARGET, the attribute that compiles a function for it, and its Vector's functions.

constexpr int kPanel = 2 * kWidth;

// Writes the sums of R rows of N vectors, or adds them to what is there; they begin again at zero.
template <int R, int N>
DX_KERNEL DX_PRODUCTS_TARGET inline void take(Vector (&own)[R][N], float* sums, bool first) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      float* to = sums + r * kColumns + n * kWidth;
      store(to, first ? own[r][n] : add(load(to), own[r][n]));
      own[r][n] = zero();
    }
}

template <int R, int N, class F>
DX_PRODUCTS_TARGET void multiply(const Products& p, const float* const* rows, const F* u,
                                 float* sums) {
  Vector own[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) own[r][n] = zero();
  bool first = true;
  int64_t left = kSummed;
  for (int64_t segment = 0; segment < p.segments; ++segment) {
    const float* a[R];
    for (int r = 0; r < R; ++r) a[r] = rows[segment * p.stride + r] + p.offset;
    const int64_t count = p.counts[segment % p.parts];
    for (int64_t c = 0; c < count;) {
      const int64_t end = std::min(count, c + left);
      left -= end - c;
      for (; c < end; ++c, u += kPanel) {
        Vector b[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) b[n] = load(u + n * kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Vector number = broadcast(a[r][c]);
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) own[r][n] = multiply_add(number, b[n], own[r][n]);
        }
      }
      if (left == 0) take(own, sums, first), first = false, left = kSummed;
    }
  }
  take(own, sums, first);
}

// All rows, as many at once as there are registers for, of N vectors of columns.
template <int N, class F>
void multiply_rows(const Products& p, int64_t count, const F* u, float* sums) {
  int64_t r = 0;
  const auto take = [&](auto rows) {
    for (; r + rows <= count; r += rows) multiply<rows, N>(p, p.rows + r, u, sums + r * kColumns);
  };
  take(std::integral_constant<int, kRows>());
  take(std::integral_constant<int, 4>());
  take(std::integral_constant<int, 2>());
  take(std::integral_constant<int, 1>());
}

template <class F>
void multiply_all(const Products& p, int64_t count, int64_t columns, const F* u, float* sums) {
  for (int64_t k = 0; k < columns; k += kPanel, u += p.numbers() * kPanel)
    if (columns - k > kWidth)
      multiply_rows<2>(p, count, u, sums + k);
    else
      multiply_rows<1>(p, count, u, sums + k);
}
