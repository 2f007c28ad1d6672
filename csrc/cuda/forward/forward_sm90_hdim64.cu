#include "cuda/forward/launch_sm90.cuh"

namespace chunkattn::cuda {

template const char* launch_forward_sm90<BFloat16, 64>(const ForwardParams&, const VectorPaths&, const KernelPlan&,
                                                       cudaStream_t);

template const char* launch_region_forward_sm90<BFloat16, 64>(const ForwardParams&, const AttendedRegions&,
                                                              const VectorPaths&, const KernelPlan&, cudaStream_t);

template const char* launch_cache_forward_sm90<BFloat16, 64>(const ForwardParams&, const KeyValueCache&, int,
                                                             const VectorPaths&, const KernelPlan&, cudaStream_t);

template const char* launch_forward_sm90<Float16, 64>(const ForwardParams&, const VectorPaths&, const KernelPlan&,
                                                      cudaStream_t);

template const char* launch_region_forward_sm90<Float16, 64>(const ForwardParams&, const AttendedRegions&,
                                                             const VectorPaths&, const KernelPlan&, cudaStream_t);

template const char* launch_cache_forward_sm90<Float16, 64>(const ForwardParams&, const KeyValueCache&, int,
                                                            const VectorPaths&, const KernelPlan&, cudaStream_t);

}  // namespace chunkattn::cuda
