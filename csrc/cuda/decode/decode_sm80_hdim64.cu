#include "cuda/decode/launch_sm80.cuh"

namespace chunkattn::cuda {

template const char* launch_decode<__nv_bfloat16, 64>(const DecodeParams&, const DecodeWorkspace&, const DecodePaths&,
                                                      const DecodePlan&, bool, cudaStream_t);

template const char* launch_decode<__half, 64>(const DecodeParams&, const DecodeWorkspace&, const DecodePaths&,
                                               const DecodePlan&, bool, cudaStream_t);

}  // namespace chunkattn::cuda
