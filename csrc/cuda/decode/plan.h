// How a call of decoding is launched. Pure host functions: launchers, introspection and tests all ask here.
#pragma once

#include <cstddef>

#include "params.h"

namespace chunkattn::cuda {

// Groups that may attend to one sequence.
constexpr int kMaxDecodeGroups = 1024;

constexpr int kMostCombineWarps = 8;

struct DecodeDevice {
  int compute_capability;  // major * 10 + minor
  int multiprocessors;
  int shared_memory;  // bytes of a multiprocessor
};

// The rows of a KV head, queries times the heads that share it, are cut into row tiles. Row tile and KV head make a
// plane; `groups` thread blocks attend in each plane. Nothing here depends on the lengths of sequences.
struct DecodePlan {
  const char* name;
  bool many_rows;  // see tile_sizes.h
  int rows;        // of a KV head
  int tile_rows;   // of a tile
  int row_tiles;
  int planes;
  int tile_keys;
  int warps;
  int groups;
  int splits;         // 0: the groups take equal shares of the keys of all sequences; else groups of each sequence
  int min_tiles;      // tiles of keys that a group takes at least, when there are as many
  int piece_cost;     // tiles of keys that a group could attend to in the time a further sequence takes it
  int combine_warps;  // to a row, of the kernel that adds up what groups found of one sequence; 0: none is needed
  bool fused_append;  // new keys and values are appended by the groups that attend to them, else by a kernel before
  int head_dim_padded;
  size_t shared_memory;  // bytes per thread block for the tiles

  int64_t blocks() const { return static_cast<int64_t>(planes) * groups; }
};

// Throws std::invalid_argument where no kernel takes the head_dim.
DecodePlan plan_decode(const DecodeParams& params, const DecodeDevice& device);

// Lays the workspace out from `memory` on, and tells its size.
DecodeWorkspace lay_out_workspace(const DecodeParams& params, const DecodePlan& plan, void* memory, size_t* bytes);

}  // namespace chunkattn::cuda
