// Where the rows of packed sequences belong. No CUDA types; host and device read the same rule.
#pragma once

#include "geometry.h"

namespace chunkattn::cuda {

// The sequence that a row of a packed tensor belongs to, by the offsets of all `batch` sequences. Where the offsets are
// no offsets the row need not lie in it.
CHUNKATTN_HOST_DEVICE int sequence_of_row(const int* cu_seqlens, int batch, int row) {
  int begin = 0, end = batch;
  while (end - begin > 1) {
    const int middle = begin + (end - begin) / 2;
    (cu_seqlens[middle] <= row ? begin : end) = middle;
  }
  return begin;
}

}  // namespace chunkattn::cuda
