#include "source_tree.h"

#include <cstdlib>

#include "built_tree.h"  // written by cmake/write_git_tree.cmake

namespace chunkattn::bench {

SourceTree parse_source_tree(std::string_view text) {
  constexpr std::string_view kSuffix = "-dirty";
  const bool dirty = text.ends_with(kSuffix);
  if (dirty) text.remove_suffix(kSuffix.size());
  return {std::string(text), dirty};
}

SourceTree find_source_tree() {
  const char* const given = std::getenv("CHUNKATTN_GIT_TREE");
  return parse_source_tree(given != nullptr && *given != '\0' ? given : kBuiltTree);
}

}  // namespace chunkattn::bench
