// chunkattn._core, what is not a tensor op: the position rules of geometry.h, how this build was made, and which kernel
// a shape takes.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/backward/plan.h"
#include "cuda/backward/tile_sizes.h"
#include "cuda/forward/plan.h"
#include "cuda/forward/tile_sizes.h"
#include "geometry.h"

namespace py = pybind11;

namespace chunkattn {
namespace {

// The rules of geometry.h hold in 32 bits up to here.
constexpr int kMaxChunkSize = 1 << 30;

ChunkGeometry make_geometry(int chunk_size, int local_size) {
  if (local_size <= 0 || local_size >= chunk_size || chunk_size > kMaxChunkSize) {
    throw py::value_error("chunk_size is " + std::to_string(chunk_size) + " and local_size is " +
                          std::to_string(local_size) + "; they take 0 < local_size < chunk_size <= 2**30.");
  }
  return {chunk_size, local_size};
}

int check_position(const char* name, int position) {
  if (position < 0) {
    throw py::value_error(std::string(name) + " is " + std::to_string(position) + "; it takes an index from 0 on.");
  }
  return position;
}

void check_range(int begin, int end) {
  check_position("begin", begin);
  if (end < begin) {
    throw py::value_error("end is " + std::to_string(end) + "; it takes begin, " + std::to_string(begin) +
                          ", or a later position.");
  }
}

std::vector<Segment> segments(const ChunkGeometry& geometry, int begin, int end) {
  check_range(begin, end);
  if (begin == end || geometry.chunk_begin(begin) != geometry.chunk_begin(end - 1)) {
    throw py::value_error("the queries [" + std::to_string(begin) + ", " + std::to_string(end) +
                          ") are no tile: it takes at least one query, and all in one chunk of " +
                          std::to_string(geometry.stride()) + ".");
  }
  const SegmentList list = geometry.segments({begin, end});
  return {list.items, list.items + list.count};
}

QueryTiling make_tiling(const ChunkGeometry& geometry, int begin, int end, int size) {
  check_range(begin, end);
  if (size <= 0) throw py::value_error("size is " + std::to_string(size) + "; it takes at least 1.");
  return {geometry, begin, end, size};
}

py::tuple tile_at(const QueryTiling& tiling, int index) {
  if (index < 0 || index >= tiling.count()) {
    throw py::index_error("index is " + std::to_string(index) + "; it takes 0 to " +
                          std::to_string(tiling.count() - 1) + ".");
  }
  const QueryTile tile = tiling.tile(index);
  return py::make_tuple(tile.begin, tile.end);
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> list;
  std::istringstream stream(CHUNKATTN_CUDA_ARCHITECTURES);
  for (std::string item; std::getline(stream, item, ',');) list.push_back(item);
  return list;
}

py::dict build_info() {
  const std::string release = CHUNKATTN_CUDA_RELEASE;
  py::dict info;
  info["version"] = CHUNKATTN_VERSION;
  info["torch"] = CHUNKATTN_TORCH_VERSION;
  info["compiler"] = compiler();
  info["cuda"] = release.empty() ? py::object(py::none()) : py::object(py::str(release));
  info["cuda_architectures"] = cuda_architectures();
  return info;
}

cuda::KernelPlan plan_forward(int batch, int seqlen_q, int seqlen_k, int heads, int kv_heads, int head_dim,
                              int compute_capability) {
  return cuda::plan_forward({batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim}, compute_capability);
}

cuda::KernelPlan plan_backward(int batch, int seqlen_q, int seqlen_k, int heads, int kv_heads, int head_dim,
                               int compute_capability) {
  return cuda::plan_backward({batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim}, compute_capability);
}

// One plan for each kernel and head_dim that the architectures of this build have.
std::vector<cuda::KernelPlan> compiled_kernels() {
  std::vector<cuda::KernelPlan> kernels;
  const auto add = [&](const cuda::KernelPlan& plan) {
    const bool known = std::any_of(kernels.begin(), kernels.end(), [&](const cuda::KernelPlan& other) {
      return std::string_view(other.name) == plan.name && other.head_dim_padded == plan.head_dim_padded;
    });
    if (!known) kernels.push_back(plan);
  };
  for (const std::string& architecture : cuda_architectures()) {
    const int compute_capability = std::stoi(architecture);
    for (const int head_dim : cuda::kForwardHeadDims) {
      add(cuda::plan_forward({1, 1, 1, 1, 1, head_dim}, compute_capability));
    }
    for (const int head_dim : cuda::kBackwardHeadDims) {
      add(cuda::plan_backward({1, 1, 1, 1, 1, head_dim}, compute_capability));
    }
  }
  return kernels;
}

void bind_plans(py::module_& module) {
  py::class_<cuda::KernelPlan>(module, "KernelPlan", "A CUDA kernel and how it is launched.")
      .def_readonly("name", &cuda::KernelPlan::name)
      .def_readonly("tile_m", &cuda::KernelPlan::tile_m, "Queries of a tile.")
      .def_readonly("tile_n", &cuda::KernelPlan::tile_n, "Keys of a tile.")
      .def_readonly("warps", &cuda::KernelPlan::warps)
      .def_readonly("stages", &cuda::KernelPlan::stages,
                    "Buffers of what the main loop streams: K and V in the forward, Q in the backward.")
      .def_readonly("head_dim_padded", &cuda::KernelPlan::head_dim_padded)
      .def_readonly("shared_memory", &cuda::KernelPlan::shared_memory, "Bytes per thread block.");
  const auto define_plan = [&](const char* name, auto* plan, const char* doc) {
    module.def(name, plan, py::kw_only(), py::arg("batch"), py::arg("seqlen_q"), py::arg("seqlen_k"), py::arg("heads"),
               py::arg("kv_heads"), py::arg("head_dim"), py::arg("compute_capability"), doc);
  };
  define_plan(
      "plan_forward", &plan_forward,
      "The forward kernel a shape takes on a device; compute_capability as major * 10 + minor. ValueError for a "
      "head_dim that no kernel takes.");
  define_plan("plan_backward", &plan_backward,
              "The backward kernel a shape takes; arguments and errors as of plan_forward.");
  module.def("compiled_kernels", &compiled_kernels,
             "The kernels of this build, one plan for each padded head_dim; none in a build without CUDA.");
}

void bind_geometry(py::module_& module) {
  py::native_enum<Regime>(module, "Regime", "enum.IntEnum", "How many chunks a key lies before its query.")
      .value("INTRA", Regime::kIntra, "the same chunk, causal")
      .value("SUCC", Regime::kSucc, "the chunk before")
      .value("INTER", Regime::kInter, "every earlier chunk")
      .finalize();
  py::native_enum<Mask>(module, "Mask", "enum.IntEnum", "Which keys of a segment the queries of a tile see.")
      .value("NONE", Mask::kNone, "every query sees every key")
      .value("CAUSAL", Mask::kCausal, "a query sees the keys up to its own position")
      .finalize();

  py::class_<Segment>(module, "Segment", "The keys [key_begin, key_end), attended with one rotation of the queries.")
      .def_readonly("key_begin", &Segment::key_begin)
      .def_readonly("key_end", &Segment::key_end)
      .def_readonly("regime", &Segment::regime)
      .def_readonly("mask", &Segment::mask);

  py::class_<ChunkGeometry>(module, "ChunkGeometry",
                            "Position rules of Dual Chunk Attention (arXiv 2402.17463) for one chunk_size and "
                            "local_size, 0 < local_size < chunk_size. Positions are absolute token indices.")
      .def(py::init(&make_geometry), py::arg("chunk_size"), py::arg("local_size"))
      .def_readonly("chunk_size", &ChunkGeometry::chunk_size)
      .def_readonly("local_size", &ChunkGeometry::local_size)
      .def_property_readonly("stride", &ChunkGeometry::stride, "chunk_size - local_size: the tokens of a chunk.")
      .def(
          "chunk_begin",
          [](const ChunkGeometry& g, int position) { return g.chunk_begin(check_position("position", position)); },
          py::arg("position"), "The first position of the chunk that holds a position.")
      .def(
          "regime",
          [](const ChunkGeometry& g, int query, int key) {
            check_position("key_position", key);
            if (query < key) {
              throw py::value_error("query_position is " + std::to_string(query) + "; it takes key_position, " +
                                    std::to_string(key) + ", or a later position.");
            }
            return g.regime(query, key);
          },
          py::arg("query_position"), py::arg("key_position"), "The regime of a pair of positions, key <= query.")
      .def(
          "key_row",
          [](const ChunkGeometry& g, int position) { return g.key_row(check_position("position", position)); },
          py::arg("position"), "The row of the rotary table for a key.")
      .def(
          "query_row",
          [](const ChunkGeometry& g, Regime regime, int position) {
            return g.query_row(regime, check_position("position", position));
          },
          py::arg("regime"), py::arg("position"), "The row of the rotary table for a query in a regime.")
      .def(
          "query_rotation",
          [](const ChunkGeometry& g, Regime regime, int position, bool rotated) {
            return g.query_rotation(regime, check_position("position", position), rotated);
          },
          py::arg("regime"), py::arg("position"), py::arg("already_rotated"),
          "The row by which a query is still to be rotated in a regime.")
      .def("segments", &segments, py::arg("begin"), py::arg("end"),
           "The key segments of the query positions [begin, end), nearest first. All must lie in one chunk.");

  py::class_<QueryTiling>(module, "QueryTiling",
                          "Cuts the query positions [begin, end) into tiles (begin, end) of at most `size` queries, "
                          "none across a chunk boundary. A sequence.")
      .def(py::init(&make_tiling), py::arg("geometry"), py::arg("begin"), py::arg("end"), py::arg("size"))
      .def("__len__", &QueryTiling::count)
      .def("__getitem__", &tile_at, py::arg("index"));
}

}  // namespace
}  // namespace chunkattn

PYBIND11_MODULE(_core, module) {
  module.doc() = "Position rules, build information and launch plans of chunkattn; no tensors.";
  chunkattn::bind_geometry(module);
  chunkattn::bind_plans(module);
  module.def("build_info", &chunkattn::build_info,
             "How this build was made: version, torch, compiler, cuda (toolkit release or None), cuda_architectures.");
}
