#include "cuda/common/tensor_map.h"

#include <cuda_runtime_api.h>

namespace chunkattn::cuda {

namespace {

// The driver's encoder, found through the runtime so that nothing links against the driver library.
decltype(&cuTensorMapEncodeTiled) find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

}  // namespace

const char* encode_key_map(CUtensorMap* map, const void* data, const Strides& strides, const AttentionShape& shape,
                           DataType dtype, int box_rows) {
  static const auto encode = find_encoder();
  if (encode == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled: it needs to be 12.0 or later";
  constexpr cuuint64_t kElementBytes = 2;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(shape.head_dim), static_cast<cuuint64_t>(shape.seqlen_k),
                              static_cast<cuuint64_t>(shape.kv_heads), static_cast<cuuint64_t>(shape.batch)};
  const cuuint64_t byte_strides[] = {strides.seq * kElementBytes, strides.head * kElementBytes,
                                     strides.batch * kElementBytes};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_strides[] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      dtype == DataType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult status = encode(map, type, 4, const_cast<void*>(data), sizes, byte_strides, box, element_strides,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the strides of k or v";
}

}  // namespace chunkattn::cuda
