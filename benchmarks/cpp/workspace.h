// The tensors of a problem in the memory of a device, and the arguments that point to them.
#pragma once

#include <map>

#include "device.h"
#include "problem.h"
#include "registry.h"

namespace chunkattn::bench {

enum class Output { kOut, kSoftmaxLse, kDq, kDk, kDv, kRotatedKeys };

// The outputs a kernel of this pass writes.
std::vector<Output> outputs_of(Pass pass);

class Workspace {
 public:
  // Uploads the inputs; with room for gradients where they hold dout.
  Workspace(Device& device, const Inputs& inputs);

  Device& device() const { return device_; }
  const Arguments& arguments() const { return arguments_; }

  HostTensor download(Output output) const;
  // Makes the scratch memory at least so large.
  void reserve_scratch(size_t bytes);

  // Fills it with NaN, so that a kernel that writes nothing is found out.
  void poison(Output output);

 private:
  struct OutputTensor {
    int64_t rows;
    int64_t width;
    DataType dtype;
    Memory memory;
  };

  const void* upload(const HostTensor& tensor);
  void* allocate(Output output, int64_t rows, int64_t width, DataType dtype);

  Device& device_;
  std::vector<Memory> inputs_;
  std::map<Output, OutputTensor> outputs_;
  Memory scratch_;
  size_t scratch_bytes_ = 0;
  Arguments arguments_{};
};

// Makes the memory the kernel needs, and writes what it reads beside the inputs.
void prepare(const Kernel& kernel, Workspace& workspace);

}  // namespace chunkattn::bench
