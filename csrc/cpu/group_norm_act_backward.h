// The loops of group_norm_act's backward: the sums over each channel's elements, and dx from them.
// Each dtype has them compiled in a file of its own, csrc/cpu/instances: they exist for every
// instruction set, activation and memory format, which took one file minutes.
#pragma once

#include "group_norm.h"

namespace dx::norm_backward {

using Sums = ChannelSums<kSums>;

// What the first pass needs of an element: xhat, act(a), dy and da.
struct Element {
  float xhat, act, dy, da;
};

// The numbers that give it, of up to N channels.
template <int N>
struct Numbers {
  float centre[N], rstd[N], residual[N], gain[N], offset[N], post_scale[N];

  DX_INLINE Numbers(const Channels& ch, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = first + i;
      centre[i] = ch.centre[k], rstd[i] = ch.rstd[k], residual[i] = ch.residual[k];
      gain[i] = ch.gain[k], offset[i] = ch.offset[k], post_scale[i] = ch.post_scale[k];
    }
  }

  template <Act activation, class T>
  DX_INLINE Element differentiate(int64_t i, T x, T dy) const {
    Element e;
    float derivative;
    e.xhat = fma(to_float(x) - centre[i], rstd[i], residual[i]);
    e.act = activate<activation>(fma(gain[i], e.xhat, offset[i]), derivative);
    e.dy = to_float(dy);
    e.da = e.dy * post_scale[i] * derivative;
    return e;
  }
};

// Whether the first pass leaves da in dx for the second, which then need not differentiate again:
// it was a quarter of the backward with SiLU. Half precision would round it.
template <class T>
constexpr bool kKeepsDa = std::is_same_v<T, float>;

// How many of the sums are needed: those behind kDaXhat only for the gradients of modulations.
constexpr int kFewSums = kDaXhat + 1;

template <int K>
DX_INLINE void add(const Element& e, float (*sums)[kLanes], int64_t lane) {
  sums[kDa][lane] += e.da;
  sums[kDaXhat][lane] = fma(e.da, e.xhat, sums[kDaXhat][lane]);
  if constexpr (K == kSums) {
    sums[kDy][lane] += e.dy;
    sums[kDyAct][lane] = fma(e.dy, e.act, sums[kDyAct][lane]);
    sums[kXhat][lane] += e.xhat;
  }
}

template <class T>
struct Tensors {
  const T* __restrict x, * __restrict dy;
  T* __restrict dx;
};

// Adds elements of a channel to its sums.
template <Act activation, int K, class T>
DX_INLINE void add_run(const Channels& ch, const Tensors<T>& t, Range range, int64_t channel,
                       Sums& sums) {
  const Numbers<1> numbers(ch, channel, 1);
  const T* __restrict x = t.x, * __restrict dy = t.dy;
  T* __restrict dx = t.dx;
  for (int64_t begin = range.begin; begin < range.end; begin += kRun) {
    const auto partial =
        sum_lanes<K>({begin, std::min(begin + kRun, range.end)},
                     [&](int64_t i, Lanes<K>& lanes, int64_t lane) DX_KERNEL {
                       const Element e = numbers.template differentiate<activation>(0, x[i], dy[i]);
                       if constexpr (kKeepsDa<T>) dx[i] = e.da;
                       add<K>(e, lanes, lane);
                     });
    for (int k = 0; k < K; ++k) sums.at(k, channel) += partial[k];
  }
}

// The same for channels k, k + 1, ... of channels_last.
template <Act activation, int K, class T, class Count>
DX_INLINE void add_column(const Channels& ch, const Tensors<T>& t, Range pixels, int64_t width,
                          int64_t k, Count count, Sums& sums) {
  const Numbers<kColumns> numbers(ch, k, count);
  const T* __restrict x = t.x, * __restrict dy = t.dy;
  T* __restrict dx = t.dx;
  for (int64_t begin = pixels.begin; begin < pixels.end; begin += kPixels) {
    const int64_t end = std::min(begin + kPixels, pixels.end);
    float partial[K][kLanes] = {};
    for (int64_t r = begin; r < end; ++r)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = r * width + k + i;
        const Element e = numbers.template differentiate<activation>(i, x[at], dy[at]);
        if constexpr (kKeepsDa<T>) dx[at] = e.da;
        add<K>(e, partial, i);
      }
    for (int s = 0; s < K; ++s)
      for (int64_t i = 0; i < count; ++i) sums.at(s, k + i) += partial[s][i];
  }
}

template <Act activation, int K, class T>
DX_INLINE void add_chunk(const Slab& slab, const Channels& ch, const Tensors<T>& t, Range range,
                         Sums& sums) {
  if (slab.g.layout == Layout::contiguous)
    slab.for_each_channel(
        range, [&](int64_t k, Range r) DX_KERNEL { add_run<activation, K>(ch, t, r, k, sums); });
  else
    slab.for_each_column([&](int64_t k, auto count) DX_KERNEL {
      add_column<activation, K>(ch, t, range, slab.width, k, count, sums);
    });
}

// What the statistics have in dx, per channel of a slab: dx = slope da - ((x - centre) second +
// first).
struct Correction {
  std::vector<float> first, second;
};

// da of an element of channel k, for the second pass.
template <class T>
struct KeptDa {
  DX_INLINE float operator()(const Channels&, int64_t, const Tensors<T>& t, int64_t i) const {
    return t.dx[i];
  }
};
template <Act activation, class T>
struct DaAgain {
  DX_INLINE float operator()(const Channels& ch, int64_t k, const Tensors<T>& t, int64_t i) const {
    return Numbers<1>(ch, k, 1).template differentiate<activation>(0, t.x[i], t.dy[i]).da;
  }
};

// dx of element i, of channel k.
template <class T, class Da>
DX_INLINE void write_element(const Channels& ch, const Correction& correction, int64_t k,
                             const Tensors<T>& t, int64_t i, const Da& da_of) {
  const float da = da_of(ch, k, t, i);
  const float of_statistics =
      fma(to_float(t.x[i]) - ch.centre[k], correction.second[k], correction.first[k]);
  round_to(fma(ch.slope[k], da, -of_statistics), t.dx[i]);
}

template <class T, class Da>
DX_INLINE void write_chunk(const Slab& slab, const Channels& ch, const Correction& correction,
                           const Tensors<T>& t, Range range, const Da& da_of) {
  if (slab.g.layout == Layout::contiguous)
    slab.for_each_channel(range, [&](int64_t k, Range r) DX_KERNEL {
#pragma omp simd
      for (int64_t i = r.begin; i < r.end; ++i) write_element(ch, correction, k, t, i, da_of);
    });
  else
    slab.for_each_column([&](int64_t k, auto count) DX_KERNEL {
      for (int64_t r = range.begin; r < range.end; ++r)
#pragma omp simd
        for (int64_t i = 0; i < count; ++i)
          write_element(ch, correction, k + i, t, r * slab.width + k + i, da_of);
    });
}

// The first pass over a chunk of a slab: adds its elements to the sums of their channels, the
// first K of them.
template <int K, class T>
void add(const Slab& slab, const Channels& channels, const Tensors<T>& t, int64_t chunk,
         Sums& sums) {
  on_best_isa([&]() DX_KERNEL {
    dispatch_act(slab.g.act, [&](auto act) DX_KERNEL {
      add_chunk<decltype(act)::value, K>(slab, channels, t, slab.chunk(chunk), sums);
    });
  });
}

// The second pass.
template <class T>
void write(const Slab& slab, const Channels& channels, const Correction& correction,
           const Tensors<T>& t, int64_t chunk) {
  const Range range = slab.chunk(chunk);
  on_best_isa([&]() DX_KERNEL {
    if constexpr (kKeepsDa<T>)
      write_chunk(slab, channels, correction, t, range, KeptDa<T>());
    else
      dispatch_act(slab.g.act, [&](auto act) DX_KERNEL {
        write_chunk(slab, channels, correction, t, range, DaAgain<decltype(act)::value, T>());
      });
  });
}

// What a file of csrc/cpu/instances compiles: for a dtype, DX_ADD of kFewSums or kSums, or
// DX_WRITE.
#define DX_ADD(K, T) \
  template void add<K>(const Slab&, const Channels&, const Tensors<T>&, int64_t, Sums&)
#define DX_WRITE(T) \
  template void write(const Slab&, const Channels&, const Correction&, const Tensors<T>&, int64_t)

extern DX_ADD(kFewSums, float);
extern DX_ADD(kFewSums, Half);
extern DX_ADD(kFewSums, BFloat16);
extern DX_ADD(kSums, float);
extern DX_ADD(kSums, Half);
extern DX_ADD(kSums, BFloat16);
extern DX_WRITE(float);
extern DX_WRITE(Half);
extern DX_WRITE(BFloat16);

}  // namespace dx::norm_backward
