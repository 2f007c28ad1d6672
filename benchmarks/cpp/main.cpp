// Microbenchmarks of the kernels, without torch. See README.md and --help.
#include <iostream>
#include <thread>

#include "device.h"
#include "measure.h"
#include "options.h"
#include "report.h"
#include "selection.h"
#include "thread_pool.h"

namespace {

using namespace chunkattn::bench;

constexpr int kDefaultRounds = 11;

int run(int argc, char** argv) {
  const Options options = parse_options(argc, argv);
  if (options.help) {
    std::cout << help_text() << defaults_text();
    return 0;
  }
  const int processors = static_cast<int>(std::thread::hardware_concurrency());
  set_threads(options.threads.value_or(processors > 0 ? processors : 1));
  const Devices devices = find_devices();
  if (options.list) {
    std::cout << list_text(devices);
    return 0;
  }
  const Selection selection = select(options, devices);
  const int rounds = options.rounds.value_or(kDefaultRounds);
  const Results results = measure(selection, devices, rounds, options.check);
  const Report report{selection, devices, results, rounds};
  std::cout << report_text(report);
  if (!options.json_path.empty()) write_result_file(report, options.json_path);
  return results.passed() ? 0 : 1;
}

}  // namespace

// Exit status: 0; 1 where a kernel failed or a check found a difference; 2 for an option that cannot be.
int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const UsageError& error) {
    std::cerr << "chunkattn_bench: " << error.what() << "\n";
    return 2;
  } catch (const std::bad_alloc&) {
    std::cerr << "chunkattn_bench: the memory does not hold this problem; make --seq, --heads or --batch smaller.\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "chunkattn_bench: " << error.what() << "\n";
    return 1;
  }
}
