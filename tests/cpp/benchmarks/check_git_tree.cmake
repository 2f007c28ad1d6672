# What cmake/write_git_tree.cmake finds in a new repository, and what chunkattn_bench writes of it.
#
#   cmake -DSCRIPT=... -DBENCH=... -DFOLDER=... -P check_git_tree.cmake
cmake_minimum_required(VERSION 3.24)

set(repository "${FOLDER}/repository")
set(header "${FOLDER}/built_tree.h")
file(REMOVE_RECURSE "${FOLDER}")
file(MAKE_DIRECTORY "${repository}")

function(expect_tree expected)
  execute_process(COMMAND ${CMAKE_COMMAND} -DSOURCE_DIR=${repository} -DHEADER=${header} -P ${SCRIPT}
    COMMAND_ERROR_IS_FATAL ANY)
  file(READ "${header}" text)
  string(REGEX REPLACE "^.*\"(.*)\".*$" "\\1" found "${text}")
  if(NOT found STREQUAL expected)
    message(SEND_ERROR "the source tree is '${found}', not '${expected}'")
  endif()
endfunction()

function(run_git)
  execute_process(COMMAND git -C "${repository}" -c user.name=test -c user.email=test@localhost ${ARGV}
    OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
endfunction()

expect_tree("")
find_program(GIT git)
if(GIT)
  run_git(init --quiet)
  expect_tree("")
  run_git(commit --quiet --allow-empty --message empty)
  expect_tree(4b825dc642cb6eb9a060e54bf8d69288fbee4904)  # of no files
  file(WRITE "${repository}/file" "")
  expect_tree(4b825dc642cb6eb9a060e54bf8d69288fbee4904-dirty)
endif()
file(WRITE "${repository}/.git_tree" "abc-dirty\n")
expect_tree(abc-dirty)
file(WRITE "${repository}/.git_tree" "no \"hash\"")
expect_tree("")

set(result "${FOLDER}/result.json")
execute_process(COMMAND ${CMAKE_COMMAND} -E env CHUNKATTN_GIT_TREE=def-dirty
    ${BENCH} --kernel dca_forward_cpu --seq 64 --heads 1 --head-dim 16 --rounds 1 --json ${result}
  OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
file(READ "${result}" text)
string(JSON tree GET "${text}" header git_tree)
string(JSON dirty GET "${text}" header dirty)
if(NOT tree STREQUAL "def" OR NOT dirty)
  message(SEND_ERROR "the result file names the tree '${tree}', dirty: ${dirty}")
endif()
