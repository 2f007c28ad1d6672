#include "options.h"

#include <getopt.h>

#include <charconv>
#include <sstream>
#include <string_view>

#include "problem.h"

namespace chunkattn::bench {

namespace {

struct NumberOption {
  const char* name;
  std::optional<int> Options::* value;
  int largest;
  const char* help;
};

constexpr int kLargest = 1 << 30;  // the rules of geometry.h hold in 32 bits up to here

constexpr NumberOption kNumbers[] = {
    {"batch", &Options::batch, kLargest, "sequences"},
    {"heads", &Options::heads, kLargest, "query heads"},
    {"kv-heads", &Options::kv_heads, kLargest,
     "key and value heads, a divisor of --heads; default: as many as --heads"},
    {"seq", &Options::seq, kLargest, "keys of a sequence"},
    {"seq-q", &Options::seq_q, kLargest, "queries, aligned with the last keys; default: as many as --seq"},
    {"head-dim", &Options::head_dim, 1 << 16, "elements of a head"},
    {"chunk", &Options::chunk, kLargest, "chunk_size"},
    {"local", &Options::local, kLargest, "local_size, less than --chunk"},
    {"rounds", &Options::rounds, 100000,
     "every round runs every kernel for 60 ms or once, in another order; default: 11"},
    {"threads", &Options::threads, 4096, "threads of the CPU kernels; default: all processors"},
};

struct TextOption {
  const char* name;
  const char* placeholder;
  const char* help;
};

constexpr TextOption kTexts[] = {
    {"kernel", "NAME", "a kernel, or several with commas between; may be given again"},
    {"dtype", "TYPE", "bf16, fp16, fp32 or fp64"},
    {"json", "PATH", "also writes the results there"},
};

constexpr TextOption kFlags[] = {
    {"list", "", "lists the kernels, and which can run here"},
    {"check", "", "also compares results with a slow float64 reference; exit status 1 when they differ"},
    {"help", "", "prints this"},
};

std::string got(const char* name, std::string_view text) {
  return "--" + std::string(name) + " got '" + std::string(text) + "'; it takes ";
}

int parse_number(const NumberOption& option, std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1 || value > option.largest) {
    throw UsageError(got(option.name, text) + "a whole number from 1 to " + std::to_string(option.largest) + ".");
  }
  return value;
}

void set_text(Options& options, std::string_view name, const std::string& text) {
  if (name == "kernel") {
    std::istringstream names(text);
    for (std::string kernel; std::getline(names, kernel, ',');) options.kernels.push_back(kernel);
    if (text.empty()) throw UsageError(got("kernel", text) + "a kernel's name; --list prints them.");
  } else if (name == "json") {
    if (text.empty()) throw UsageError(got("json", text) + "the path of a file to write.");
    options.json_path = text;
  } else {
    DataType dtype{};
    if (!parse_dtype(text, dtype)) throw UsageError(got("dtype", text) + "one of " + all_dtype_names() + ".");
    options.dtype = dtype;
  }
}

void set_flag(Options& options, std::string_view name) {
  (name == "list" ? options.list : name == "check" ? options.check : options.help) = true;
}

// Numbers, then texts, then flags, as set_option tells them apart.
std::vector<option> getopt_table() {
  std::vector<option> table;
  for (const NumberOption& number : kNumbers) table.push_back({number.name, required_argument, nullptr, 0});
  for (const TextOption& text : kTexts) table.push_back({text.name, required_argument, nullptr, 0});
  for (const TextOption& flag : kFlags) table.push_back({flag.name, no_argument, nullptr, 0});
  table.push_back({nullptr, 0, nullptr, 0});
  return table;
}

void set_option(Options& options, size_t index, const char* name) {
  if (index < std::size(kNumbers)) {
    const NumberOption& number = kNumbers[index];
    options.*number.value = parse_number(number, optarg);
  } else if (index < std::size(kNumbers) + std::size(kTexts)) {
    set_text(options, name, optarg);
  } else {
    set_flag(options, name);
  }
}

}  // namespace

Options parse_options(int argc, char** argv) {
  const std::vector<option> table = getopt_table();
  Options options;
  opterr = 0;
  for (;;) {
    int index = 0;
    const char* const word = optind < argc ? argv[optind] : "";
    const int result = getopt_long(argc, argv, "+:", table.data(), &index);
    if (result == -1) break;
    if (result == ':') throw UsageError(std::string(word) + " got no value; --help says what it takes.");
    if (result == '?') {
      throw UsageError(std::string("got '") + word + "', which is no option or short for several; --help lists them.");
    }
    set_option(options, static_cast<size_t>(index), table[static_cast<size_t>(index)].name);
  }
  if (optind < argc) {
    throw UsageError(std::string("got '") + argv[optind] + "'; it takes options only, and --help lists them.");
  }
  return options;
}

std::string help_text() {
  std::ostringstream text;
  const auto line = [&](const std::string& option, const char* help) {
    text << "  " << option << std::string(option.size() < 18 ? 18 - option.size() : 1, ' ') << help << "\n";
  };
  text << "Usage: chunkattn_bench [options]\n"
          "Times the kernels of Dual Chunk Attention, and measures what the machine does at best.\n\n";
  for (const TextOption& flag : kFlags) line("--" + std::string(flag.name), flag.help);
  for (const TextOption& option : kTexts) line("--" + std::string(option.name) + " " + option.placeholder, option.help);
  for (const NumberOption& option : kNumbers) line("--" + std::string(option.name) + " N", option.help);
  text << "\nWithout --kernel: every kernel of the GPU that takes the dtype and head_dim; without a GPU, of the CPU.\n";
  return text.str();
}

}  // namespace chunkattn::bench
