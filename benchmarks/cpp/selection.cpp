#include "selection.h"

#include <algorithm>
#include <iomanip>
#include <sstream>

#include "comparison.h"

namespace chunkattn::bench {

namespace {

// Seconds on a GPU; on a CPU, seconds on two cores.
constexpr Problem kCudaProblem = {{1, 8192, 8192, 32, 32, 128}, {3072, 512}, DataType::kBFloat16};
constexpr Problem kCpuProblem = {{1, 2048, 2048, 8, 8, 64}, {768, 128}, DataType::kFloat32};

const Problem& default_problem(Place place) { return place == Place::kCuda ? kCudaProblem : kCpuProblem; }

const Kernel& find_kernel(const std::string& name) {
  std::string names;
  for (const Kernel& kernel : all_kernels()) {
    if (name == kernel.name) return kernel;
    names += (names.empty() ? "" : ", ") + std::string(kernel.name);
  }
  throw UsageError("--kernel got '" + name + "'; it takes " + names + ".");
}

std::string got(const char* option, int value) { return std::string(option) + " is " + std::to_string(value); }

Problem make_problem(const Options& options, Place place) {
  Problem problem = default_problem(place);
  AttentionShape& shape = problem.shape;
  shape.batch = options.batch.value_or(shape.batch);
  shape.heads = options.heads.value_or(shape.heads);
  shape.kv_heads = options.kv_heads.value_or(shape.heads);
  shape.seqlen_k = options.seq.value_or(shape.seqlen_k);
  shape.seqlen_q = options.seq_q.value_or(shape.seqlen_k);
  shape.head_dim = options.head_dim.value_or(shape.head_dim);
  problem.geometry.chunk_size = options.chunk.value_or(problem.geometry.chunk_size);
  problem.geometry.local_size = options.local.value_or(problem.geometry.local_size);
  problem.dtype = options.dtype.value_or(problem.dtype);
  if (shape.heads % shape.kv_heads != 0) {
    throw UsageError(got("--kv-heads", shape.kv_heads) + "; it takes a divisor of --heads, which is " +
                     std::to_string(shape.heads) + ".");
  }
  if (shape.seqlen_q > shape.seqlen_k) {
    throw UsageError(got("--seq-q", shape.seqlen_q) + "; it takes at most --seq, which is " +
                     std::to_string(shape.seqlen_k) + ".");
  }
  if (problem.geometry.local_size >= problem.geometry.chunk_size) {
    throw UsageError(got("--local", problem.geometry.local_size) + "; it takes less than --chunk, which is " +
                     std::to_string(problem.geometry.chunk_size) + ".");
  }
  return problem;
}

std::string slow_check_refusal(const Kernel& kernel, const Problem& problem) {
  if (kernel.pass != Pass::kBackward || problem.forward_flops() <= kReferenceFlops) return "";
  std::ostringstream text;
  text << "--check got a forward pass of " << std::setprecision(3) << problem.forward_flops() / 1e9 << " GFLOP; for "
       << kernel.name << " it takes up to " << kReferenceFlops / 1e9
       << " GFLOP, which a smaller --seq, --heads or --batch bring.";
  return text.str();
}

// Why a kernel that can run here does not take the problem, as one sentence; empty when it does.
std::string problem_refusal(const Kernel& kernel, const Problem& problem, const Device& device, bool check) {
  if (!takes_dtype(kernel, problem.dtype)) {
    return "--dtype is " + std::string(short_name(problem.dtype)) + "; " + kernel.name + " takes " +
           dtype_names(kernel, ", ") + ".";
  }
  if (kernel.refusal != nullptr) {
    const std::string reason = kernel.refusal(problem.shape, device.compute_capability());
    if (!reason.empty()) return got("--head-dim", problem.shape.head_dim) + "; " + reason + ".";
  }
  return check ? slow_check_refusal(kernel, problem) : "";
}

Selection select_named(const Options& options, const Devices& devices) {
  Selection selection;
  for (const std::string& name : options.kernels) {
    const Kernel& kernel = find_kernel(name);
    const std::string reason = unavailable_reason(kernel, devices);
    if (!reason.empty()) throw UsageError("--kernel got '" + name + "', which cannot run here: " + reason + ".");
    auto& kernels = selection.kernels;
    if (std::find(kernels.begin(), kernels.end(), &kernel) == kernels.end()) kernels.push_back(&kernel);
  }
  selection.problem = make_problem(options, selection.uses(Place::kCuda) ? Place::kCuda : Place::kCpu);
  for (const Kernel* const kernel : selection.kernels) {
    const std::string reason = problem_refusal(*kernel, selection.problem, *devices.at(kernel->place), options.check);
    if (!reason.empty()) throw UsageError(reason);
  }
  return selection;
}

Selection select_all(const Options& options, const Devices& devices, Place place) {
  Selection selection;
  selection.problem = make_problem(options, place);
  for (const Kernel& kernel : all_kernels()) {
    if (kernel.place != place) continue;
    std::string reason = unavailable_reason(kernel, devices);
    if (reason.empty()) reason = problem_refusal(kernel, selection.problem, *devices.at(place), options.check);
    if (reason.empty()) {
      selection.kernels.push_back(&kernel);
    } else {
      selection.absent.emplace_back(kernel.name, reason);
    }
  }
  return selection;
}

}  // namespace

bool Selection::uses(Place place) const {
  return std::any_of(kernels.begin(), kernels.end(), [&](const Kernel* kernel) { return kernel->place == place; });
}

bool Selection::has_backward() const {
  return std::any_of(kernels.begin(), kernels.end(),
                     [](const Kernel* kernel) { return kernel->pass == Pass::kBackward; });
}

Selection select(const Options& options, const Devices& devices) {
  Selection selection;
  if (!options.kernels.empty()) return select_named(options, devices);
  if (devices.cuda != nullptr) selection = select_all(options, devices, Place::kCuda);
  if (selection.kernels.empty()) selection = select_all(options, devices, Place::kCpu);
  return selection;
}

std::string defaults_text() {
  const auto describe = [](const Problem& problem) {
    const AttentionShape& shape = problem.shape;
    return "--batch " + std::to_string(shape.batch) + " --heads " + std::to_string(shape.heads) + " --seq " +
           std::to_string(shape.seqlen_k) + " --head-dim " + std::to_string(shape.head_dim) + " --chunk " +
           std::to_string(problem.geometry.chunk_size) + " --local " + std::to_string(problem.geometry.local_size) +
           " --dtype " + short_name(problem.dtype);
  };
  return "Defaults on a GPU: " + describe(kCudaProblem) + "\nDefaults on a CPU: " + describe(kCpuProblem) + "\n";
}

}  // namespace chunkattn::bench
