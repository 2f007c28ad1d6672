#include "cuda/common/side_streams.h"

#include <vector>

namespace chunkattn::cuda {

namespace {

cudaError_t create(SideStreams* streams) {
  int least = 0, greatest = 0;
  cudaError_t status = cudaDeviceGetStreamPriorityRange(&least, &greatest);
  if (status == cudaSuccess) status = cudaStreamCreateWithPriority(&streams->eager, cudaStreamNonBlocking, greatest);
  if (status == cudaSuccess) status = cudaStreamCreateWithPriority(&streams->patient, cudaStreamNonBlocking, least);
  if (status == cudaSuccess) status = cudaEventCreateWithFlags(&streams->event, cudaEventDisableTiming);
  return status;
}

}  // namespace

const char* SideStreams::find(SideStreams* streams) {
  // A thread's own: another could record the event between this one's record and wait, or be capturing a graph. They
  // live as long as the process: when a thread ends the driver may be gone already.
  thread_local std::vector<SideStreams> of_device;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if (static_cast<size_t>(device) >= of_device.size()) of_device.resize(device + 1);
  SideStreams& own = of_device[device];
  if (own.event == nullptr) {
    // A thread may come here first while it captures a graph, to which this does not belong.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    status = create(&own);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  *streams = own;
  return nullptr;
}

const char* SideStreams::follow(cudaStream_t follower, cudaStream_t leader) const {
  cudaError_t status = cudaEventRecord(event, leader);
  if (status == cudaSuccess) status = cudaStreamWaitEvent(follower, event, 0);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace chunkattn::cuda
