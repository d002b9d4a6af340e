// The Python module diffusion_ext._C. Importing it registers the ops (registration.cpp and the
// kernels' own files). Here, without torch's headers, is what Python asks of the library itself.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/fingerprint.h"
#include "cpu/simd.h"
#include "cuda/group_norm_plan.h"
#include "math/normal.h"
#include "math/philox.h"

namespace py = pybind11;

namespace {

py::dict build_facts() {
  py::dict facts;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  facts["compiler"] = "gcc " __VERSION__;
#elif defined(_MSC_VER)
  facts["compiler"] = "msvc " + std::to_string(_MSC_FULL_VER);
#endif
  facts["c++ standard"] = std::to_string(__cplusplus);
  facts["stable ABI"] = "torch 2.10 and later";
  return facts;
}

using Words = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

// [n, 4] counters and [n, 2] keys to [n, 4] words.
Words philox4x32(const Words& counters, const Words& keys) {
  if (counters.ndim() != 2 || counters.shape(1) != 4)
    throw py::value_error("counters: wanted shape [n, 4]");
  if (keys.ndim() != 2 || keys.shape(1) != 2 || keys.shape(0) != counters.shape(0))
    throw py::value_error("keys: wanted shape [n, 2]");
  Words out({counters.shape(0), py::ssize_t{4}});
  const auto c = counters.unchecked<2>(), k = keys.unchecked<2>();
  auto r = out.mutable_unchecked<2>();
  for (py::ssize_t i = 0; i < counters.shape(0); ++i) {
    const dx::Words4 w = dx::philox4x32({c(i, 0), c(i, 1), c(i, 2), c(i, 3)}, k(i, 0), k(i, 1));
    r(i, 0) = w.r0, r(i, 1) = w.r1, r(i, 2) = w.r2, r(i, 3) = w.r3;
  }
  return out;
}

// [n, 2] random words to [n, 2] normals.
py::array_t<float> box_muller(const Words& words) {
  if (words.ndim() != 2 || words.shape(1) != 2) throw py::value_error("words: wanted shape [n, 2]");
  py::array_t<float> out({words.shape(0), py::ssize_t{2}});
  const auto w = words.unchecked<2>();
  auto z = out.mutable_unchecked<2>();
  dx::on_best_isa([&]() DX_KERNEL {
    for (py::ssize_t i = 0; i < words.shape(0); ++i)
      dx::box_muller(w(i, 0), w(i, 1), z(i, 0), z(i, 1));
  });
  return out;
}

using Numbers = py::array_t<float, py::array::c_style | py::array::forcecast>;

// [n], three times, to a*b + c [n] in one rounding, by the way that the kernels take.
Numbers fma_of_arrays(const Numbers& a, const Numbers& b, const Numbers& c) {
  if (a.ndim() != 1 || b.ndim() != 1 || b.size() != a.size())
    throw py::value_error("a, b: wanted one shape [n]");
  if (c.ndim() != 1 || c.size() != a.size()) throw py::value_error("c: wanted a's shape [n]");
  Numbers out(a.size());
  const float *x = a.data(), *y = b.data(), *z = c.data();
  float* to = out.mutable_data();
  dx::on_best_isa([&]() DX_KERNEL {
    for (py::ssize_t i = 0; i < a.size(); ++i) to[i] = dx::fma(x[i], y[i], z[i]);
  });
  return out;
}

// How group_norm_act would run on a GPU: what a person tuning it looks at.
py::dict group_norm_plan(const std::vector<int64_t>& shape, int64_t groups, int element_size,
                         bool channels_last, bool backward, bool aligned, int multiprocessors,
                         int shared_bytes, int max_cluster) {
  if (shape.size() < 2) throw py::value_error("shape: wanted [N, C, *spatial]");
  if (groups < 1 || shape[1] % groups != 0)
    throw py::value_error("groups: wanted a divisor of the channels");
  if (element_size != 2 && element_size != 4)
    throw py::value_error("element_size: wanted 2 or 4 bytes");
  int64_t spatial = 1;
  for (size_t i = 2; i < shape.size(); ++i) spatial *= shape[i];
  const dx::NormPlan p = dx::group_norm_plan(
      {shape[0], shape[1], spatial, groups, channels_last, aligned, element_size, backward},
      {multiprocessors, shared_bytes, max_cluster});
  py::dict plan;
  plan["kind"] = p.on_chip ? "on chip" : "split";
  plan["vector"] = p.vector;
  plan["threads"] = p.threads;
  plan["parts"] = p.parts;
  plan["bundle"] = p.bundle;
  plan["lanes"] = p.lanes;
  plan["run"] = p.run;
  plan["pieces"] = p.pieces;
  plan["kept"] = p.kept;
  plan["blocks"] = shape[0] * p.slabs * p.parts;
  plan["shared_bytes"] = p.shared_bytes;
  return plan;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of diffusion_ext: its CPU kernels and facts about them.";
  m.def("build_facts", &build_facts, "How this library was compiled.");
  m.def(
      "cpu_capability", [] { return dx::name_of(dx::best_isa()); },
      "The instruction set that the CPU kernels use: baseline, avx2, avx512 or neon.");
  m.attr("has_fma") = dx::has_fma;
  m.def(
      "fingerprint",
      [](uintptr_t address, int64_t filters, int64_t numbers, int bytes) {
        return bytes == 2
                   ? dx::fingerprint(reinterpret_cast<const uint16_t*>(address), filters, numbers)
                   : dx::fingerprint(reinterpret_cast<const uint32_t*>(address), filters, numbers);
      },
      py::arg("address"), py::arg("filters"), py::arg("numbers"), py::arg("bytes"),
      "64 bits of a weight [filters, numbers] at an address, of numbers of 4 or 2 bytes: of all "
      "of\n"
      "them up to 16384, above of the runs that csrc/cpu/fingerprint.h says.");
  m.def("philox4x32", &philox4x32, py::arg("counters"), py::arg("keys"),
        "Philox4x32-10 of uint32 counters [n, 4] under keys [n, 2]: words [n, 4].");
  m.def("box_muller", &box_muller, py::arg("words"),
        "Two normals from two words: uint32 [n, 2] to float32 [n, 2].");
  m.def(
      "fma", &fma_of_arrays, py::arg("a"), py::arg("b"), py::arg("c"),
      "a*b + c of float32 [n] with one rounding, as every op computes it whose bits are promised:\n"
      "by the processor's instruction, or without one by float64.");
  m.def("group_norm_plan", &group_norm_plan, py::arg("shape"), py::arg("groups"),
        py::arg("element_size"), py::kw_only(), py::arg("channels_last") = false,
        py::arg("backward") = false, py::arg("aligned") = true, py::arg("multiprocessors") = 132,
        py::arg("shared_bytes") = 228352, py::arg("max_cluster") = 8,
        "How group_norm_act of x `shape` [N, C, *spatial] runs on a GPU, by default an H100: kind\n"
        "('on chip' or 'split'), vector (elements of an access), threads and blocks of the launch\n"
        "that reads x, parts (blocks of a slab), bundle (groups of a slab), shared_bytes of a\n"
        "block, and the walk of a thread; csrc/cuda/group_norm_plan.h explains each.");
}
