#include "cuda/decode/launch_sm80.cuh"

namespace chunkattn::cuda {

template const char* launch_decode<BFloat16, 256>(const DecodeParams&, const DecodeWorkspace&, const DecodePaths&,
                                                  const DecodePlan&, bool, cudaStream_t);

template const char* launch_decode<Float16, 256>(const DecodeParams&, const DecodeWorkspace&, const DecodePaths&,
                                                 const DecodePlan&, bool, cudaStream_t);

}  // namespace chunkattn::cuda
