// Uninitialised memory for the kernels' workspaces.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace chunkattn::cpu {

// `size` elements of a trivial type, aligned to cache lines. Empty when size is 0.
template <class Element>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0)
      : data_(size > 0 ? static_cast<Element*>(::operator new(size * sizeof(Element), kAlignment)) : nullptr) {}

  Element* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};

  struct Delete {
    void operator()(Element* data) const { ::operator delete(data, kAlignment); }
  };

  std::unique_ptr<Element, Delete> data_;
};

}  // namespace chunkattn::cpu
