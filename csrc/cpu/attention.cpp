// attention: softmax(scale q k^T + mask) v, block by block of the keys, so that no row of scores is
// ever whole (Rabe & Staats 2021; Dao et al. 2022). A task is a tile of the queries of one head:
// its scores of a block of keys stay in the cache, and so do those keys. Where the processor
// multiplies pairs of bfloat16, what is multiplied stays in that.
#include <utility>

#include "../math/activation.h"
#include "attention_inputs.h"
#include "convolution.h"
#include "panels.h"

namespace dx {
namespace {

constexpr int64_t kQueries = 48;        // rows of a tile: whole blocks of panels.h
constexpr float kLog2E = 1.442695041f;  // weights are powers of 2
constexpr int64_t kKeys = 256;          // of a block
// Products that are summed up one after the other; longer sums than torch's would round more.
constexpr int64_t kPart = 128;
constexpr int64_t kRow = kKeys + 16;  // from a row of scores to the next, which so share no set

struct Attention {
  Heads q, k, v;
  Mask mask;
  Target y;  // [B, H, Tq, dv], whose last stride is 1
  int64_t y_batch_stride, y_head_stride, y_row_stride, heads, queries, keys;
  float scale;
  bool causal;  // query i sees the keys up to i

  int64_t tiles() const { return ceil_div(queries, kQueries); }
  Panels values() const { return Panels(v.size); }
  int64_t width() const { return values().width(); }
  bool pairs() const { return v.pairs != nullptr; }
  int64_t words(int64_t keys) const { return pairs() ? (keys + 1) / 2 : keys; }
};

// What a thread works in.
struct Scratch {
  float *keys, *values;          // of a head, in panels, block by block
  float *queries, *scores, *y;   // of a tile [kQueries, d], [kQueries, kRow], [kQueries, width]
  float *most, *total, *shrink;  // [kQueries]

  static int64_t whole(int64_t keys) { return ceil_div(keys, kColumns) * kColumns; }
  static int64_t size(const Attention& a) {
    return whole(a.keys) * a.q.size + a.keys * a.width() +
           kQueries * (a.q.size + kRow + a.width() + 3);
  }
  Scratch(const Attention& a, float* at) {
    const auto take = [&](int64_t count) { return std::exchange(at, at + count); };
    keys = take(whole(a.keys) * a.q.size), values = take(a.keys * a.width());
    scores = take(kQueries * kRow), y = take(kQueries * a.width());
    queries = take(kQueries * a.q.size);
    most = take(kQueries), total = take(kQueries), shrink = take(kQueries);
  }
};

// --- a head --------------------------------------------------------------------------------------

// Its keys as the columns of a matrix, [d, keys] of each block.
void lay_out_keys(const Attention& a, int64_t b, int64_t h, float* to) {
  const int64_t size = a.k.words();
  TileBuffer buffer;
  for (int64_t from = 0; from < a.keys; from += kKeys) {
    const int64_t keys = std::min(kKeys, a.keys - from);
    const Panels panels(keys);
    for (int64_t j = 0, width; j < keys; j += width) {
      width = panels.width_at(j);
      float* panel = to + (from + j) * size;
      if (j + width > keys) std::fill_n(panel, width * size, 0.0f);
      int64_t i = 0;
      const auto take = [&](auto rows) {
        for (; i + rows <= std::min(width, keys - j); i += rows) {
          const Tile<const float> tile = a.k.rows(b, h, from + j + i, rows, buffer);
          for (int64_t c = 0; c < size; ++c)
            for (int64_t r = 0; r < rows; ++r)
              panel[c * width + i + r] = tile.at[r * tile.stride + c];
        }
      };
      // Eight rows are asked of the memory at once: they lie far apart.
      if (8 * size <= kTileElements) take(std::integral_constant<int, 8>());
      take(std::integral_constant<int, 1>());
    }
  }
}

// Two neighbouring rows as pairs of a number of each; with zeros where there is no second one.
DX_INLINE void pair_up(const BFloat16* first, const BFloat16* second, int64_t count, float* to) {
  for (int64_t c = 0; c < count; ++c) {
    const uint32_t high = second == nullptr ? 0 : second[c].bits;
    to[c] = float_of(first[c].bits | high << 16);
  }
}

// Its values, [keys, dv] of each kPart keys, or [keys / 2, dv] pairs.
void lay_out_values(const Attention& a, int64_t b, int64_t h, float* to) {
  const Panels panels = a.values();
  TileBuffer buffer;
  for (int64_t j = 0; j < a.keys; j += a.pairs() ? 2 : 1) {
    const float* row = buffer;
    if (a.pairs())
      pair_up(a.v.pairs + a.v.at(b, h, j),
              j + 1 < a.keys ? a.v.pairs + a.v.at(b, h, j + 1) : nullptr, a.v.size, buffer);
    else
      row = a.v.row(b, h, j, buffer);
    const int64_t first = j / kPart * kPart, keys = a.words(std::min(kPart, a.keys - first));
    for (int64_t c = 0, width; c < a.v.size; c += width) {
      width = panels.width_at(c);
      const int64_t there = std::min(a.v.size - c, width);
      float* of_panel = to + a.words(first) * a.width() + c * keys + a.words(j - first) * width;
      std::fill(std::copy_n(row + c, there, of_panel), of_panel + width, 0.0f);
    }
  }
}

// --- a block of keys -----------------------------------------------------------------------------

// f(a, b) of all pairs of 32 numbers, then of what came of those, and so on: in one order on every
// processor.
template <class F>
DX_INLINE float fold(float (&parts)[kColumns], const F& f) {
#pragma GCC unroll 5
  for (int64_t half = kColumns / 2; half > 0; half /= 2)
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) parts[i] = f(parts[i], parts[i + half]);
  return parts[0];
}

// A row of scores s as weights 2^(factor (s - the largest so far)). `total` is that of all so far,
// and `shrink` what those before this block shrink by. Where no key has counted yet, `most` is
// -infinity and the weights are 0. Differences are taken before anything else, for scores may be
// as large as floats are: what masks a key is often the least of them.
DX_INLINE void soften(float* __restrict s, int64_t keys, float factor, float& most, float& total,
                      float& shrink) {
  const auto larger = [](float a, float b) DX_KERNEL { return a > b ? a : b; };
  const auto sum = [](float a, float b) DX_KERNEL { return a + b; };
  const int64_t whole = Scratch::whole(keys);
  for (int64_t j = keys; j < whole; ++j) s[j] = kMasked;
  float parts[kColumns];
  std::fill_n(parts, kColumns, most);
  for (int64_t j = 0; j < whole; j += kColumns)
#pragma omp simd
    for (int64_t i = 0; i < kColumns; ++i) parts[i] = larger(s[j + i], parts[i]);
  const float now = fold(parts, larger), from = now == kMasked ? 0.0f : now;
  std::fill_n(parts, kColumns, 0.0f);
  for (int64_t j = 0; j < whole; j += kColumns)
#pragma omp simd
    for (int64_t i = 0; i < kColumns; ++i) {
      const float p = exp2(factor * (s[j + i] - from));
      s[j + i] = p, parts[i] += p;
    }
  shrink = exp2(factor * (most - from));
  total = multiply_add(total, shrink, fold(parts, sum));
  most = now;
}

// Scores of `count` queries, from `first` on, and of the block's keys, as weights.
void score(const Attention& a, int64_t b, int64_t h, const Scratch& t, int64_t first, int64_t count,
           int64_t from, int64_t keys) {
  const Panels panels(keys);
  const int64_t words = a.q.words();
  std::fill_n(t.shrink, count, 1.0f);
  for (int64_t j = 0, width; j < keys; j += width) {
    width = panels.width_at(j);
    const float* panel = t.keys + (from + j) * words;
    for (int64_t c = 0; c < words; c += kPart)
      multiply_panel({t.queries + c, words, count, std::min(kPart, words - c), panel + c * width,
                      t.scores + j, kRow, c == 0 ? nullptr : t.shrink, a.pairs()},
                     width);
  }
  on_best_isa([&]() DX_KERNEL {
    // The scale is part of the softening, unless it turns the largest score into the least.
    const bool scaled = a.mask.data != nullptr || !(a.scale > 0.0f);
    const int64_t of_head = b * a.mask.batch_stride + h * a.mask.head_stride;
    for (int64_t r = 0; r < count; ++r) {
      float* s = t.scores + r * kRow;
      if (a.mask.data != nullptr) {
        a.mask.add(of_head + (first + r) * a.mask.row_stride + from * a.mask.key_stride, keys,
                   a.scale, s);
      } else if (scaled) {
        for (int64_t j = 0; j < keys; ++j) s[j] *= a.scale;
      }
      const int64_t seen = a.causal ? std::clamp<int64_t>(first + r + 1 - from, 0, keys) : keys;
      for (int64_t j = seen; j < keys; ++j) s[j] = kMasked;
      soften(s, keys, scaled ? kLog2E : kLog2E * a.scale, t.most[r], t.total[r], t.shrink[r]);
    }
  });
  if (a.pairs())
    for (int64_t r = 0; r < count; ++r) round_to_pairs(t.scores + r * kRow, Scratch::whole(keys));
}

// y = shrink y + weights times values.
void weigh(const Attention& a, const Scratch& t, int64_t count, int64_t from, int64_t keys) {
  const Panels panels = a.values();
  for (int64_t j = 0; j < keys; j += kPart) {
    const int64_t summed = a.words(std::min(kPart, keys - j));
    const float* values = t.values + a.words(from + j) * a.width();
    for (int64_t c = 0, width; c < a.v.size; c += width) {
      width = panels.width_at(c);
      multiply_panel({t.scores + a.words(j), kRow, count, summed, values + c * summed, t.y + c,
                      a.width(), t.shrink, a.pairs()},
                     width);
    }
    std::fill_n(t.shrink, count, 1.0f);
  }
}

// --- a tile of queries ---------------------------------------------------------------------------

void load_queries(const Attention& a, int64_t b, int64_t h, const Scratch& t, int64_t first,
                  int64_t count) {
  TileBuffer buffer;
  for (int64_t r = 0; r < count; ++r)
    std::copy_n(a.q.row(b, h, first + r, buffer), a.q.words(), t.queries + r * a.q.words());
}

void attend(const Attention& a, int64_t b, int64_t h, const Scratch& t, int64_t first) {
  const int64_t count = std::min(kQueries, a.queries - first), width = a.width();
  load_queries(a, b, h, t, first, count);
  std::fill_n(t.y, count * width, 0.0f);
  std::fill_n(t.most, count, kMasked), std::fill_n(t.total, count, 0.0f);
  const int64_t seen = a.causal ? std::min(a.keys, first + count) : a.keys;
  for (int64_t from = 0; from < seen; from += kKeys) {
    const int64_t keys = std::min(kKeys, a.keys - from);
    score(a, b, h, t, first, count, from, keys);
    weigh(a, t, count, from, keys);
  }
  TileBuffer buffer;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = b * a.y_batch_stride + h * a.y_head_stride + (first + r) * a.y_row_stride;
    const Place place{at, a.v.size, 1, a.v.size};
    const Tile<float> tile = a.y.place(place, buffer);
    const float over = t.total[r] == 0.0f ? 0.0f : 1.0f / t.total[r];  // no key counted
    const float* __restrict y = t.y + r * width;
    float* __restrict to = tile.at;
    on_best_isa([&]() DX_KERNEL {
      for (int64_t c = 0; c < a.v.size; ++c) to[c] = over * y[c];
    });
    a.y.keep(tile, place);
  }
}

void attend_all(const Attention& a, int64_t batch) {
  share_with_scratch(batch * a.heads * a.tiles(), Scratch::size(a),
                     [&](int64_t begin, int64_t end, float* memory) {
                       const Scratch scratch(a, memory);
                       for (int64_t task = begin; task < end; ++task) {
                         const int64_t head = task / a.tiles(), b = head / a.heads,
                                       h = head % a.heads;
                         if (task == begin || task % a.tiles() == 0) {
                           lay_out_keys(a, b, h, scratch.keys);
                           lay_out_values(a, b, h, scratch.values);
                         }
                         attend(a, b, h, scratch, task % a.tiles() * kQueries);
                       }
                     });
}

// --- the op --------------------------------------------------------------------------------------

void check_heads(const char* name, const Tensor& t, const Tensor& q) {
  check_floating(name, t);
  STD_TORCH_CHECK(t.dim() == 4, name, ": wanted shape [B, H, T, d]");
  check_same_kind(name, t, q);
  STD_TORCH_CHECK(t.size(0) == q.size(0) && t.size(1) == q.size(1), name,
                  ": wanted q's batch and heads");
  STD_TORCH_CHECK(t.size(3) <= kTileElements, name, ": wanted heads of at most ", kTileElements);
}

Mask mask_of(const MaybeTensor& t, const Tensor& q, int64_t keys) {
  if (!t) return {};
  const ScalarType dtype = t->scalar_type();
  STD_TORCH_CHECK(t->is_cpu() && (dtype == ScalarType::Bool || dtype == ScalarType::Float ||
                                  dtype == ScalarType::Half || dtype == ScalarType::BFloat16),
                  "mask: wanted bools, or numbers of at most 32 bits, on the CPU");
  STD_TORCH_CHECK(t->dim() == 4 && t->size(0) == q.size(0) && t->size(1) == q.size(1) &&
                      t->size(2) == q.size(2) && t->size(3) == keys,
                  "mask: wanted shape [B, H, Tq, Tk]");
  return {t->const_data_ptr(), dtype, t->stride(0), t->stride(1), t->stride(2), t->stride(3)};
}

Heads heads_of(const Tensor& t) {
  const bool pairs = t.scalar_type() == ScalarType::BFloat16 && multiplies_bf16();
  return {Source(t),   t.stride(0), t.stride(1),
          t.stride(2), t.size(3),   pairs ? data_of<BFloat16>(t) : nullptr};
}

Tensor attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const MaybeTensor& mask,
                 double scale, bool causal) {
  const auto dense_rows = [](const Tensor& t) {
    return t.dim() == 4 && t.stride(3) != 1 ? torch::stable::contiguous(t) : t;
  };
  const Tensor q = dense_rows(q_), k = dense_rows(k_), v = dense_rows(v_);
  check_heads("q", q, q), check_heads("k", k, q), check_heads("v", v, q);
  STD_TORCH_CHECK(k.size(3) == q.size(3), "k: wanted q's size of heads");
  STD_TORCH_CHECK(v.size(2) == k.size(2), "v: wanted as many as keys");
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  // It lies as torch's does: as the queries do, where torch's own kernel would serve.
  const bool rows = q_.stride(3) == 1 && k_.stride(3) == 1 && v_.stride(3) == 1;
  const Tensor y =
      in_huge_pages(rows && v.size(3) == q.size(3) ? torch::stable::empty_like(q)
                                                   : fresh(q, {batch, heads, queries, v.size(3)}));
  const Mask of_mask = mask_of(mask, q, k.size(2));
  if (y.numel() == 0) return y;
  attend_all({heads_of(q), heads_of(k), heads_of(v), of_mask, Target(y), y.stride(0), y.stride(1),
              y.stride(2), heads, queries, causal ? std::min(queries, k.size(2)) : k.size(2),
              float(scale), causal},
             batch);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(diffusion_ext, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }

}  // namespace
}  // namespace dx
