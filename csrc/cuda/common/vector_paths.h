// Which tensors may be read and written in 16-byte pieces. No CUDA types.
#pragma once

#include <cstdint>

#include "params.h"

namespace chunkattn::cuda {

// What is false takes element-wise paths, slower and right for any stride, alignment and head_dim.
struct VectorPaths {
  bool q;
  bool k;
  bool v;
  bool out;
  bool rotation;  // q may, and pairs and table rows fall on whole pieces too
};

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Rows of 16-bit elements that all start on a multiple of 16 bytes.
inline bool rows_aligned(const void* pointer, const Strides& strides, int head_dim) {
  return is_aligned(pointer) && head_dim % 8 == 0 && strides.batch % 8 == 0 && strides.seq % 8 == 0 &&
         strides.head % 8 == 0;
}

inline bool rotation_aligned(const RotaryTable& rotary) {
  const int piece = rotary.interleaved ? 8 : 16;  // rotate-half pairs lie rotary_dim / 2 apart
  return is_aligned(rotary.cos) && is_aligned(rotary.sin) && rotary.row_stride % 4 == 0 &&
         rotary.rotary_dim % piece == 0;
}

inline VectorPaths vector_paths(const ForwardParams& params) {
  const int head_dim = params.shape.head_dim;
  const bool q = rows_aligned(params.q, params.q_strides, head_dim);
  return {q, rows_aligned(params.k, params.k_strides, head_dim), rows_aligned(params.v, params.v_strides, head_dim),
          rows_aligned(params.out, params.out_strides, head_dim), q && rotation_aligned(params.rotary)};
}

// The same of the backward kernels.
struct BackwardVectorPaths {
  bool q[3];  // of each regime
  bool k;
  bool v;
  bool dout;
  bool dk;  // pairs and table rows fall on whole pieces too, where dk is to be rotated
  bool dv;
  bool prepare;  // all that is read and written before the main loop
  bool finish;   // all that is read and written after it

  CHUNKATTN_HOST_DEVICE bool main_loop() const { return q[0] && q[1] && q[2] && k && v && dout; }
};

inline BackwardVectorPaths vector_paths(const BackwardParams& params, const BackwardWorkspace& workspace) {
  const ForwardParams& forward = params.forward;
  const int head_dim = forward.shape.head_dim;
  const bool rotation = rotation_aligned(forward.rotary);
  BackwardVectorPaths paths{};
  for (int i = 0; i < 3; ++i) {
    paths.q[i] = rows_aligned(workspace.regimes[i].q, workspace.regimes[i].q_strides, head_dim);
  }
  paths.k = rows_aligned(forward.k, forward.k_strides, head_dim);
  paths.v = rows_aligned(forward.v, forward.v_strides, head_dim);
  paths.dout = rows_aligned(params.dout, params.dout_strides, head_dim);
  paths.dk = rows_aligned(params.dk, params.dk_strides, head_dim) && (workspace.dk_rotated || rotation);
  paths.dv = rows_aligned(params.dv, params.dv_strides, head_dim);
  paths.prepare = rotation && paths.q[0] && paths.q[1] && paths.q[2] && paths.dout &&
                  rows_aligned(forward.q, forward.q_strides, head_dim) &&
                  rows_aligned(forward.out, forward.out_strides, head_dim);
  paths.finish = rotation && rows_aligned(params.dq, params.dq_strides, head_dim);
  return paths;
}

}  // namespace chunkattn::cuda
