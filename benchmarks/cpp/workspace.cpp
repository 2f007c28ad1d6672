#include "workspace.h"

namespace chunkattn::bench {

namespace {

Strides contiguous_strides(int seqlen, int heads, int head_dim) {
  const int64_t row = static_cast<int64_t>(heads) * head_dim;
  return {seqlen * row, row, head_dim};
}

}  // namespace

std::vector<Output> outputs_of(Pass pass) {
  switch (pass) {
    case Pass::kForward:
      return {Output::kOut, Output::kSoftmaxLse};
    case Pass::kBackward:
      return {Output::kDq, Output::kDk, Output::kDv};
    case Pass::kRotateKeys:
      break;
  }
  return {Output::kRotatedKeys};
}

Workspace::Workspace(Device& device, const Inputs& inputs) : device_(device) {
  const Problem& problem = inputs.problem;
  const AttentionShape& shape = problem.shape;
  const Strides query_strides = contiguous_strides(shape.seqlen_q, shape.heads, shape.head_dim);
  const Strides key_strides = contiguous_strides(shape.seqlen_k, shape.kv_heads, shape.head_dim);
  const auto like = [&](Output output, const HostTensor& tensor) {
    return allocate(output, tensor.rows, tensor.width, tensor.dtype);
  };

  ForwardParams& forward = arguments_.backward.forward;
  forward.q = upload(inputs.q);
  forward.k = upload(inputs.k);
  forward.v = upload(inputs.v);
  forward.out = like(Output::kOut, inputs.q);
  forward.softmax_lse = static_cast<float*>(allocate(Output::kSoftmaxLse, inputs.q.rows, 1, DataType::kFloat32));
  forward.q_strides = query_strides;
  forward.k_strides = key_strides;
  forward.v_strides = key_strides;
  forward.out_strides = query_strides;
  forward.shape = shape;
  forward.dtype = problem.dtype;
  forward.geometry = problem.geometry;
  forward.rotary.cos = static_cast<const float*>(upload(inputs.cos));
  forward.rotary.sin = static_cast<const float*>(upload(inputs.sin));
  forward.rotary.row_stride = inputs.cos.width;
  forward.rotary.rotary_dim = problem.rotary_dim();
  forward.scale = problem.scale();
  inputs_.push_back(device.allocate(sizeof(int)));
  forward.tile_counter = static_cast<int*>(inputs_.back().get());

  arguments_.rotated_keys = like(Output::kRotatedKeys, inputs.k);
  arguments_.rotated_keys_strides = key_strides;
  if (inputs.dout.rows == 0) return;
  BackwardParams& backward = arguments_.backward;
  backward.dout = upload(inputs.dout);
  backward.dq = like(Output::kDq, inputs.q);
  backward.dk = like(Output::kDk, inputs.k);
  backward.dv = like(Output::kDv, inputs.v);
  backward.dout_strides = query_strides;
  backward.dq_strides = query_strides;
  backward.dk_strides = key_strides;
  backward.dv_strides = key_strides;
}

const void* Workspace::upload(const HostTensor& tensor) {
  inputs_.push_back(device_.allocate(tensor.bytes()));
  device_.upload(inputs_.back().get(), tensor.data.data(), tensor.bytes());
  return inputs_.back().get();
}

void* Workspace::allocate(Output output, int64_t rows, int64_t width, DataType dtype) {
  const Memory memory = device_.allocate(static_cast<size_t>(rows * width) * element_bytes(dtype));
  outputs_[output] = {rows, width, dtype, memory};
  return memory.get();
}

HostTensor Workspace::download(Output output) const {
  const OutputTensor& from = outputs_.at(output);
  HostTensor tensor(from.rows, from.width, from.dtype);
  device_.download(tensor.data.data(), from.memory.get(), tensor.bytes());
  return tensor;
}

void Workspace::reserve_scratch(size_t bytes) {
  if (bytes <= scratch_bytes_) return;
  scratch_ = device_.allocate(bytes);
  scratch_bytes_ = bytes;
  arguments_.scratch = scratch_.get();
}

void Workspace::poison(Output output) {
  const OutputTensor& tensor = outputs_.at(output);
  constexpr int kNanByte = 0xff;  // all bits set are a NaN in every dtype
  device_.fill(tensor.memory.get(), kNanByte,
               static_cast<size_t>(tensor.rows * tensor.width) * element_bytes(tensor.dtype));
}

void prepare(const Kernel& kernel, Workspace& workspace) {
  if (kernel.scratch_bytes != nullptr) workspace.reserve_scratch(kernel.scratch_bytes(workspace.arguments()));
  for (const Launch launch : kernel.prepare) {
    workspace.device().run([&](void* stream) { return launch(workspace.arguments(), stream); });
  }
}

}  // namespace chunkattn::bench
