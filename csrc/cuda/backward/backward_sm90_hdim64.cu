#include "cuda/backward/launch_sm90.cuh"

namespace chunkattn::cuda {

template const char* launch_backward_sm90<BFloat16, 64>(const BackwardParams&, const BackwardWorkspace&,
                                                        const BackwardVectorPaths&, const KernelPlan&, cudaStream_t);

template const char* launch_region_backward_sm90<BFloat16, 64>(const BackwardParams&, const BackwardWorkspace&,
                                                               const AttendedRegions&, const KeyGradientSums&,
                                                               const BackwardVectorPaths&, const KernelPlan&,
                                                               cudaStream_t);

template const char* launch_backward_sm90<Float16, 64>(const BackwardParams&, const BackwardWorkspace&,
                                                       const BackwardVectorPaths&, const KernelPlan&, cudaStream_t);

template const char* launch_region_backward_sm90<Float16, 64>(const BackwardParams&, const BackwardWorkspace&,
                                                              const AttendedRegions&, const KeyGradientSums&,
                                                              const BackwardVectorPaths&, const KernelPlan&,
                                                              cudaStream_t);

}  // namespace chunkattn::cuda
