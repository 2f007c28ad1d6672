// The command line.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"

namespace chunkattn::bench {

// One sentence that names the option, what it got and what it takes.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What was given; the rest follows from the kernels that run (selection.h).
struct Options {
  bool help = false;
  bool list = false;
  bool check = false;
  std::vector<std::string> kernels;
  std::optional<DataType> dtype;
  std::optional<int> batch;
  std::optional<int> heads;
  std::optional<int> kv_heads;
  std::optional<int> seq;
  std::optional<int> seq_q;
  std::optional<int> head_dim;
  std::optional<int> chunk;
  std::optional<int> local;
  std::optional<int> rounds;
  std::optional<int> threads;
  std::string json_path;
};

Options parse_options(int argc, char** argv);

std::string help_text();

}  // namespace chunkattn::bench
