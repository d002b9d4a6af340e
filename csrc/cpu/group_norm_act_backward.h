// The loops of group_norm_act's backward: the sums over each channel's elements, and dx from them.
// They are compiled in the files of csrc/cpu/instances: there is one for every instruction set,
// activation and memory format, which takes a while.
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

  template <Act activation>
  DX_INLINE Element differentiate(int64_t i, float x, float dy) const {
    Element e;
    float derivative;
    e.xhat = multiply_add(x - centre[i], rstd[i], residual[i]);
    e.act = activate<activation>(multiply_add(gain[i], e.xhat, offset[i]), derivative);
    e.dy = dy;
    e.da = dy * post_scale[i] * derivative;
    return e;
  }
};

// How many of the sums are needed: those behind kDaXhat only for the gradients of modulations.
constexpr int kFewSums = kDaXhat + 1;

template <int K>
DX_INLINE void add(const Element& e, float (*sums)[kLanes], int64_t lane) {
  sums[kDa][lane] += e.da;
  sums[kDaXhat][lane] = multiply_add(e.da, e.xhat, sums[kDaXhat][lane]);
  if constexpr (K == kSums) {
    sums[kDy][lane] += e.dy;
    sums[kDyAct][lane] = multiply_add(e.dy, e.act, sums[kDyAct][lane]);
    sums[kXhat][lane] += e.xhat;
  }
}

// All of one dtype.
struct Tensors {
  Source x, dy;
  Target dx;

  // Whether the first pass leaves da in dx for the second, which then need not differentiate again:
  // it was a quarter of the backward with SiLU. Half precision would round it.
  bool keeps_da() const { return dx.in_place(); }
};

struct Tiles {
  Tile<const float> x, dy;
  Tile<float> dx;
};

enum class Pass { sums, result };

// Calls body(tiles) for those at a place. Only the pass of the result keeps dx where it is not in
// place.
template <Pass pass, class Body>
DX_INLINE void on_tiles(const Tensors& t, const Place& place, const Body& body) {
  TileBuffer buffers[3];
  const Tiles tiles{t.x.view(place, buffers[0]), t.dy.view(place, buffers[1]),
                    t.dx.place(place, buffers[2])};
  body(tiles);
  if (pass == Pass::result) t.dx.keep(tiles.dx, place);
}

// Adds neighbours of a channel to its sums.
template <Act activation, int K, bool keeps_da>
DX_INLINE void add_run(const Channels& ch, const Tiles& t, Range range, int64_t channel,
                       Sums& sums) {
  const Numbers<1> numbers(ch, channel, 1);
  const float* __restrict x = t.x.at + range.begin;
  const float* __restrict dy = t.dy.at + range.begin;
  float* __restrict dx = t.dx.at + range.begin;
  const auto partial =
      sum_lanes<K>(range.size(), [&](int64_t i, Lanes<K>& lanes, int64_t lane) DX_KERNEL {
        const Element e = numbers.template differentiate<activation>(0, x[i], dy[i]);
        if constexpr (keeps_da) dx[i] = e.da;
        add<K>(e, lanes, lane);
      });
  for (int k = 0; k < K; ++k) sums.at(k, channel) += partial[k];
}

// Tiles of channels k, k + 1, ... of a panel's.
DX_INLINE Tiles column_of(const Tiles& t, int64_t k, Range panel) {
  const int64_t i = k - panel.begin;
  return {{t.x.at + i, t.x.stride}, {t.dy.at + i, t.dy.stride}, {t.dx.at + i, t.dx.stride}};
}

// Adds pixels' channels k, k + 1, ... to sums of theirs.
template <Act activation, int K, bool keeps_da, class Count>
DX_INLINE void add_column(const Channels& ch, const Tiles& t, int64_t pixels, int64_t k,
                          Count count, float* sums) {
  const Numbers<kColumns> numbers(ch, k, count);
  Lanes<K> own = {};
  for (int s = 0; s < K; ++s)
    for (int64_t i = 0; i < count; ++i) own[s][i] = sums[s * kPanel + i];
  for (int64_t r = 0; r < pixels; ++r) {
    const float* __restrict x = t.x.at + r * t.x.stride;
    const float* __restrict dy = t.dy.at + r * t.dy.stride;
    float* __restrict dx = t.dx.at + r * t.dx.stride;
    for (int64_t i = 0; i < count; ++i) {
      const Element e = numbers.template differentiate<activation>(i, x[i], dy[i]);
      if constexpr (keeps_da) dx[i] = e.da;
      add<K>(e, own, i);
    }
  }
  for (int s = 0; s < K; ++s)
    for (int64_t i = 0; i < count; ++i) sums[s * kPanel + i] = own[s][i];
}

// Calls body(tiles, pixels, first channel, channels) for every column of channels_last pixels.
template <Pass pass, class Body>
DX_INLINE void for_each_column(const Slab& slab, const Tensors& t, Range pixels, Range panel,
                               const Body& body) {
  for_each_part(pixels, tile_pixels(panel, t.dx.in_place()), [&](Range part) DX_KERNEL {
    on_tiles<pass>(t, slab.place(part, panel), [&](const Tiles& tiles) DX_KERNEL {
      dx::for_each_column(panel, [&](int64_t k, auto count) DX_KERNEL {
        body(column_of(tiles, k, panel), part.size(), k, count);
      });
    });
  });
}

// Adds the pixels of a panel to the sums of their channels.
template <Act activation, int K, bool keeps_da>
DX_INLINE void add_panel(const Slab& slab, const Channels& ch, const Tensors& t, Range pixels,
                         Range panel, Sums& sums) {
  for_each_part(pixels, kPixels, [&](Range run) DX_KERNEL {
    float partial[K * kPanel];
    for (int s = 0; s < K; ++s)
      for (int64_t i = 0; i < panel.size(); ++i) partial[s * kPanel + i] = 0;
    for_each_column<Pass::sums>(
        slab, t, run, panel,
        [&](const Tiles& tiles, int64_t count_of_pixels, int64_t k, auto count) DX_KERNEL {
          add_column<activation, K, keeps_da>(ch, tiles, count_of_pixels, k, count,
                                              partial + (k - panel.begin));
        });
    for (int s = 0; s < K; ++s) sums.add(s, panel.begin, panel.size(), partial + s * kPanel);
  });
}

// Contiguous: calls body(tiles, channel, its elements in them).
template <Pass pass, class Body>
DX_INLINE void for_each_run(const Slab& slab, const Tensors& t, Range range, const Body& body) {
  for_each_part(range, tile_run(t.dx.in_place()), [&](Range part) DX_KERNEL {
    on_tiles<pass>(t, slab.place(part), [&](const Tiles& tiles) DX_KERNEL {
      slab.for_each_channel(part, [&](int64_t k, Range r) DX_KERNEL {
        body(tiles, k, Range{r.begin - part.begin, r.end - part.begin});
      });
    });
  });
}

template <Act activation, int K, bool keeps_da>
DX_INLINE void add_chunk(const Slab& slab, const Channels& ch, const Tensors& t, Range range,
                         Sums& sums) {
  if (slab.g.layout == Layout::contiguous)
    for_each_run<Pass::sums>(slab, t, range, [&](const Tiles& tiles, int64_t k, Range r) DX_KERNEL {
      add_run<activation, K, keeps_da>(ch, tiles, r, k, sums);
    });
  else
    slab.for_each_panel([&](Range panel) DX_KERNEL {
      add_panel<activation, K, keeps_da>(slab, ch, t, range, panel, sums);
    });
}

// What the statistics have in dx, per channel of a slab: dx = slope da - ((x - centre) second +
// first).
struct Correction {
  std::vector<float> first, second;
};

// da of an element of channel k, for the second pass: what the first one left, or made again.
struct KeptDa {
  DX_INLINE float operator()(const Channels&, int64_t, float, float, const float& dx) const {
    return dx;
  }
};
template <Act activation>
struct DaAgain {
  DX_INLINE float operator()(const Channels& ch, int64_t k, float x, float dy, const float&) const {
    return Numbers<1>(ch, k, 1).template differentiate<activation>(0, x, dy).da;
  }
};

// dx of an element of channel k.
template <class Da>
DX_INLINE void write_element(const Channels& ch, const Correction& correction, int64_t k, float x,
                             float dy, float& dx, const Da& da_of) {
  const float of_statistics =
      multiply_add(x - ch.centre[k], correction.second[k], correction.first[k]);
  dx = multiply_add(ch.slope[k], da_of(ch, k, x, dy, dx), -of_statistics);
}

template <class Da>
DX_INLINE void write_chunk(const Slab& slab, const Channels& ch, const Correction& correction,
                           const Tensors& t, Range range, const Da& da_of) {
  if (slab.g.layout == Layout::contiguous)
    for_each_run<Pass::result>(slab, t, range,
                               [&](const Tiles& tiles, int64_t k, Range r) DX_KERNEL {
                                 const float *x = tiles.x.at, *dy = tiles.dy.at;
                                 float* dx = tiles.dx.at;
#pragma omp simd
                                 for (int64_t i = r.begin; i < r.end; ++i)
                                   write_element(ch, correction, k, x[i], dy[i], dx[i], da_of);
                               });
  else
    slab.for_each_panel([&](Range panel) DX_KERNEL {
      for_each_column<Pass::result>(
          slab, t, range, panel,
          [&](const Tiles& tiles, int64_t pixels, int64_t k, auto count) DX_KERNEL {
            for (int64_t r = 0; r < pixels; ++r) {
              const float* x = tiles.x.at + r * tiles.x.stride;
              const float* dy = tiles.dy.at + r * tiles.dy.stride;
              float* dx = tiles.dx.at + r * tiles.dx.stride;
#pragma omp simd
              for (int64_t i = 0; i < count; ++i)
                write_element(ch, correction, k + i, x[i], dy[i], dx[i], da_of);
            }
          });
    });
}

// The first pass over a chunk of a slab: adds its elements to the sums of their channels, the
// first K of them.
template <int K>
void add(const Slab& slab, const Channels& channels, const Tensors& t, int64_t chunk, Sums& sums) {
  on_best_isa([&]() DX_KERNEL {
    dispatch_act(slab.g.act, [&](auto act) DX_KERNEL {
      with_constants(
          [&](auto keeps_da) DX_KERNEL {
            add_chunk<decltype(act)::value, K, keeps_da>(slab, channels, t, slab.chunk(chunk),
                                                         sums);
          },
          t.keeps_da());
    });
  });
}

// The second pass.
void write(const Slab& slab, const Channels& channels, const Correction& correction,
           const Tensors& t, int64_t chunk);

extern template void add<kFewSums>(const Slab&, const Channels&, const Tensors&, int64_t, Sums&);
extern template void add<kSums>(const Slab&, const Channels&, const Tensors&, int64_t, Sums&);

}  // namespace dx::norm_backward
