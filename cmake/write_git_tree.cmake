# an executable never names older sources than its own; the file is touched only when its text changes.
#
#   cmake -DSOURCE_DIR=... -DHEADER=... -P write_git_tree.cmake
#
# The tree is found as benchmarks/common.py does: where the repository's history is not at hand, the file .git_tree names
# it. The suffix -dirty says that files differ from it; the text is empty where it is unknown.
cmake_minimum_required(VERSION 3.24)

set(tree "")
if(EXISTS "${SOURCE_DIR}/.git_tree")
  file(READ "${SOURCE_DIR}/.git_tree" tree)
  string(STRIP "${tree}" tree)
elseif(EXISTS "${SOURCE_DIR}/.git")
  execute_process(COMMAND git -C "${SOURCE_DIR}" rev-parse --verify --quiet "HEAD^{tree}"
    OUTPUT_VARIABLE tree OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  execute_process(COMMAND git -C "${SOURCE_DIR}" status --porcelain
    OUTPUT_VARIABLE changes RESULT_VARIABLE status ERROR_QUIET)
  if(NOT status STREQUAL "0")
    set(tree "")
  elseif(changes)
    string(APPEND tree "-dirty")
  endif()
endif()
if(NOT tree MATCHES "^[0-9a-f]+(-dirty)?$")
  set(tree "")
endif()
file(CONFIGURE OUTPUT "${HEADER}" CONTENT "inline constexpr char kBuiltTree[] = \"${tree}\";\n")
