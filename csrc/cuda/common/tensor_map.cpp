#include "cuda/common/tensor_map.h"

#include <cuda_runtime_api.h>

namespace chunkattn::cuda {

namespace {

constexpr cuuint32_t kGradientBoxRows = 64;

// The driver's encoder, found through the runtime so that nothing links against the driver library.
decltype(&cuTensorMapEncodeTiled) find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

template <int kRank>
const char* encode(CUtensorMap* map, CUtensorMapDataType type, const void* data, const cuuint64_t (&sizes)[kRank],
                   const cuuint64_t (&byte_strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  static const auto encoder = find_encoder();
  if (encoder == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled: it needs to be 12.0 or later";
  cuuint32_t element_strides[kRank];
  for (cuuint32_t& stride : element_strides) stride = 1;
  const CUresult status = encoder(map, type, kRank, const_cast<void*>(data), sizes, byte_strides, box, element_strides,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the strides of a tensor";
}

}  // namespace

const char* encode_row_map(CUtensorMap* map, const RowTensor& tensor, DataType dtype, int box_rows) {
  constexpr cuuint64_t kElementBytes = 2;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(tensor.head_dim), static_cast<cuuint64_t>(tensor.rows),
                              static_cast<cuuint64_t>(tensor.heads), static_cast<cuuint64_t>(tensor.batch)};
  // Packed tensors have no batch stride.
  const int64_t batch_stride = tensor.batch > 1 ? tensor.strides.batch : tensor.strides.seq;
  const cuuint64_t byte_strides[] = {tensor.strides.seq * kElementBytes, tensor.strides.head * kElementBytes,
                                     batch_stride * kElementBytes};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const CUtensorMapDataType type =
      dtype == DataType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, tensor.data, sizes, byte_strides, box);
}

const char* encode_window_map(CUtensorMap* map, const RowTensor& tensor, DataType dtype, int box_rows) {
  constexpr int kElementBytes = 2;
  RowTensor windows = tensor;
  windows.data = static_cast<const char*>(tensor.data) - box_rows * tensor.strides.seq * kElementBytes;
  windows.strides.batch = tensor.strides.seq;
  windows.batch = tensor.rows + 1;
  windows.rows = box_rows;
  return encode_row_map(map, windows, dtype, box_rows);
}

const char* encode_gradient_map(CUtensorMap* map, float* data, int64_t planes, int rows, int head_dim) {
  const cuuint64_t row_bytes = head_dim * sizeof(float);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(planes)};
  const cuuint64_t byte_strides[] = {row_bytes, rows * row_bytes};
  const cuuint32_t box[] = {32, kGradientBoxRows, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, data, sizes, byte_strides, box);
}

const char* encode_gradient_window_map(CUtensorMap* map, float* data, int64_t planes, int rows, int head_dim) {
  const cuuint64_t row_bytes = head_dim * sizeof(float);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(head_dim), kGradientBoxRows, static_cast<cuuint64_t>(planes),
                              static_cast<cuuint64_t>(rows) + 1};
  const cuuint64_t byte_strides[] = {row_bytes, rows * row_bytes, row_bytes};
  const cuuint32_t box[] = {32, kGradientBoxRows, 1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, data - static_cast<int64_t>(kGradientBoxRows) * head_dim, sizes,
                byte_strides, box);
}

}  // namespace chunkattn::cuda
