// The git tree of the sources that numbers are from.
#pragma once

#include <string>
#include <string_view>

namespace chunkattn::bench {

struct SourceTree {
  std::string hash;  // empty: unknown
  bool dirty;        // files differed from it
};

// Of a hash with the suffix -dirty or without.
SourceTree parse_source_tree(std::string_view text);

// What the environment variable CHUNKATTN_GIT_TREE names, as for the Python benchmarks; without it, what was built.
SourceTree find_source_tree();

}  // namespace chunkattn::bench
