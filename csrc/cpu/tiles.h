// Tensors of any dtype as loops over float32 see them: tile by tile, in the tensor itself or, of
// half precision, in a buffer that stays in the cache. So a loop is compiled once.
#pragma once

#include <cstdint>

#include "../ops/group_norm_act.h"
#include "halves.h"

namespace dx {

constexpr int64_t kTileElements = 2048;  // at most: 8 KiB of float32
using TileBuffer = float[kTileElements];

// Where a tile is in a tensor: rows of `length` neighbours, `stride` elements from one to the next.
struct Place {
  int64_t first, stride, rows, length;

  // One row where there is nothing between them.
  Place joined() const { return stride == length ? Place{first, 0, 1, rows * length} : *this; }
};

// A tile as float32: row r begins at [r * stride].
template <class F>
struct Tile {
  F* at;
  int64_t stride;
};

inline Floating floating_of(const float*) { return Floating::float32; }
inline Floating floating_of(const Half*) { return Floating::float16; }
inline Floating floating_of(const BFloat16*) { return Floating::bfloat16; }

// A tensor to be read.
class Source {
 public:
  template <class T>
  explicit Source(const T* data) : data_(data), dtype_(floating_of(data)) {}
  explicit Source(const Tensor& t) : data_(t.const_data_ptr()), dtype_(floating_of("tile", t)) {}

  // Whether tiles lie in the tensor itself.
  bool in_place() const { return dtype_ == Floating::float32; }

  Tile<const float> view(const Place& p, float* buffer) const {
    if (in_place()) return {static_cast<const float*>(data_) + p.first, p.stride};
    if (dtype_ == Floating::float16)
      load_from<Half>(p.joined(), buffer);
    else
      load_from<BFloat16>(p.joined(), buffer);
    return {buffer, p.length};
  }

 private:
  template <class T>
  void load_from(const Place& p, float* to) const {
    load(static_cast<const T*>(data_) + p.first, p.stride, p.rows, p.length, to);
  }

  const void* data_;
  Floating dtype_;
};

// A tensor to be written: what is computed in the place of a tile has then to be kept there.
class Target {
 public:
  template <class T>
  explicit Target(T* data) : data_(data), dtype_(floating_of(data)) {}
  explicit Target(const Tensor& t) : data_(t.mutable_data_ptr()), dtype_(floating_of("tile", t)) {}

  bool in_place() const { return dtype_ == Floating::float32; }

  Tile<float> place(const Place& p, float* buffer) const {
    if (in_place()) return {static_cast<float*>(data_) + p.first, p.stride};
    return {buffer, p.length};
  }

  void keep(const Tile<float>& tile, const Place& p) const {
    if (dtype_ == Floating::float16) store_to<Half>(p.joined(), tile.at);
    if (dtype_ == Floating::bfloat16) store_to<BFloat16>(p.joined(), tile.at);
  }

 private:
  template <class T>
  void store_to(const Place& p, const float* from) const {
    store(from, p.rows, p.length, static_cast<T*>(data_) + p.first, p.stride);
  }

  void* data_;
  Floating dtype_;
};

}  // namespace dx
