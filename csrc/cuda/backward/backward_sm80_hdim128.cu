#include "cuda/backward/launch_sm80.cuh"

namespace chunkattn::cuda {

template const char* launch_backward_sm80<BFloat16, 128>(const BackwardParams&, const BackwardWorkspace&,
                                                         const BackwardVectorPaths&, const KernelPlan&, cudaStream_t);

template const char* launch_region_backward_sm80<BFloat16, 128>(const BackwardParams&, const BackwardWorkspace&,
                                                                const AttendedRegions&, const KeyGradientSums&,
                                                                const BackwardVectorPaths&, const KernelPlan&,
                                                                cudaStream_t);

template const char* launch_backward_sm80<Float16, 128>(const BackwardParams&, const BackwardWorkspace&,
                                                        const BackwardVectorPaths&, const KernelPlan&, cudaStream_t);

template const char* launch_region_backward_sm80<Float16, 128>(const BackwardParams&, const BackwardWorkspace&,
                                                               const AttendedRegions&, const KeyGradientSums&,
                                                               const BackwardVectorPaths&, const KernelPlan&,
                                                               cudaStream_t);

}  // namespace chunkattn::cuda
