// The text of a source tree, and which one counts: the environment's before the build's.
#include <cstdlib>

#include "check.h"
#include "source_tree.h"

namespace {

using namespace chunkattn::bench;

void test_text() {
  const SourceTree clean = parse_source_tree("abc");
  CHECK(clean.hash == "abc" && !clean.dirty, clean.hash);
  const SourceTree dirty = parse_source_tree("abc-dirty");
  CHECK(dirty.hash == "abc" && dirty.dirty, dirty.hash);
  const SourceTree unknown = parse_source_tree("");
  CHECK(unknown.hash.empty() && !unknown.dirty, unknown.hash);
}

void test_environment() {
  unsetenv("CHUNKATTN_GIT_TREE");
  const SourceTree built = find_source_tree();
  setenv("CHUNKATTN_GIT_TREE", "", 1);
  CHECK(find_source_tree().hash == built.hash, built.hash);
  setenv("CHUNKATTN_GIT_TREE", "def-dirty", 1);
  const SourceTree given = find_source_tree();
  CHECK(given.hash == "def" && given.dirty, given.hash);
}

}  // namespace

int main() {
  test_text();
  test_environment();
  return chunkattn::test::report();
}
