// Lays out workspaces. No CUDA types.
#pragma once

#include <cstddef>
#include <cstdint>

namespace chunkattn::cuda {

// Hands out pieces of a block of memory, or just counts them when there is none yet.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <typename Element>
  Element* take(int64_t count, size_t element_bytes = sizeof(Element)) {
    constexpr size_t kAlignment = 256;
    unsigned char* piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * element_bytes + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<Element*>(piece);
  }

  size_t used() const { return used_; }

 private:
  unsigned char* memory_;
  size_t used_ = 0;
};

}  // namespace chunkattn::cuda
