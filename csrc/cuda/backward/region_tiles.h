// The tiles of keys that thread blocks own in the backward of select-and-merge attention, and in which order they add
// where they take turns. No CUDA types.
#pragma once

#include "geometry.h"

namespace chunkattn::cuda {

struct RegionTile {
  int group;
  int list;        // of those of the KV head
  int within;      // place among the list's tiles, behind which stand the group's own
  QueryTile keys;  // counted in the list, or positions of the group's own; none where either is shorter
  int order;       // how many tiles of the group add to dq before this one
};

// Of one KV head. Each of its lists has as many tiles as the longest may have, and as a whole group has of its own:
// those a list or a group is too short for have no keys.
struct RegionTiling {
  int lists;   // of a group
  int listed;  // tiles of the longest list
  int own;     // tiles of a whole group
  int size;    // keys of a tile
  int group_size;
  int seqlen;

  CHUNKATTN_HOST_DEVICE int per_list() const { return listed + own; }

  CHUNKATTN_HOST_DEVICE bool is_listed(const RegionTile& tile) const { return tile.within < listed; }

  CHUNKATTN_HOST_DEVICE QueryTile queries(int group) const {
    const int begin = group * group_size;
    return {begin, seqlen - begin < group_size ? seqlen : begin + group_size};
  }

  // List after list, a list's tiles before the group's own. listed_keys(group, list) says how many keys a list has.
  template <typename ListedKeys>
  CHUNKATTN_HOST_DEVICE RegionTile tile(int index, ListedKeys&& listed_keys) const {
    RegionTile tile;
    const int pair = index / per_list();
    tile.group = pair / lists;
    tile.list = pair % lists;
    tile.within = index % per_list();
    const QueryTile group = queries(tile.group);
    const int keys = listed_keys(tile.group, tile.list);
    const int begin = is_listed(tile) ? tile.within * size : group.begin + (tile.within - listed) * size;
    const int end = is_listed(tile) ? keys : group.end;
    tile.keys = {begin, end - begin < size ? end : begin + size};
    tile.order = is_listed(tile) ? tile.within : (keys + size - 1) / size + tile.within - listed;
    return tile;
  }

  // Tiles of a KV head add to dk and dv in the order of their indices. Those without keys add nothing: the first of a
  // group's own takes their turns where the list is too short, its last where the group is.
  CHUNKATTN_HOST_DEVICE int turn(const RegionTile& tile) const {
    return (tile.group * lists + tile.list) * per_list() + tile.within - missing_before(tile);
  }

  CHUNKATTN_HOST_DEVICE int turns(const RegionTile& tile) const {
    const bool last = !is_listed(tile) && tile.keys.end == queries(tile.group).end;
    return missing_before(tile) + 1 + (last ? per_list() - 1 - tile.within : 0);
  }

 private:
  CHUNKATTN_HOST_DEVICE int missing_before(const RegionTile& tile) const {
    return tile.within == listed ? listed - tile.order : 0;
  }
};

}  // namespace chunkattn::cuda
