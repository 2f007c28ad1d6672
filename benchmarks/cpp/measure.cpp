#include "measure.h"

#include <algorithm>
#include <numeric>
#include <random>

namespace chunkattn::bench {

namespace {

// One kernel among those that are timed against each other.
struct Runner {
  Measurement& measurement;
  Workspace& workspace;
  int repeats;  // in one round

  std::vector<double> time(int calls) {
    return workspace.device().time(
        [this](void* stream) { return measurement.kernel->launch(workspace.arguments(), stream); }, calls);
  }
};

// Runs a step of a kernel; when it fails, notes why and leaves the other kernels alone.
template <class Step>
void guarded(Measurement& measurement, const Step& step) {
  if (!measurement.failure.empty()) return;
  try {
    step();
  } catch (const std::exception& error) {
    measurement.failure = error.what();
  }
}

// How many calls a round makes: about so long.
int choose_repeats(Runner& runner) {
  constexpr double kMilliseconds = 60;
  constexpr double kMostCalls = 100;
  runner.time(1);  // warm up
  const double estimate = runner.time(1)[0];
  return static_cast<int>(std::clamp(kMilliseconds / std::max(estimate, 1e-3), 1.0, kMostCalls));
}

// Clocks move under load and with what ran before, so kernels are compared within rounds of random order.
void time_interleaved(std::vector<Runner>& runners, int rounds) {
  std::mt19937 random(1);
  std::vector<size_t> order(runners.size());
  std::iota(order.begin(), order.end(), size_t{0});
  for (int round = 0; round < rounds; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t index : order) {
      Runner& runner = runners[index];
      guarded(runner.measurement, [&] {
        const std::vector<double> samples = runner.time(runner.repeats);
        auto& all = runner.measurement.milliseconds;
        all.insert(all.end(), samples.begin(), samples.end());
      });
    }
  }
}

}  // namespace

bool Measurement::passed() const {
  return failure.empty() && std::all_of(comparisons.begin(), comparisons.end(),
                                        [](const Comparison& comparison) { return comparison.passed(); });
}

bool Results::passed() const {
  return std::all_of(measurements.begin(), measurements.end(),
                     [](const Measurement& measurement) { return measurement.passed(); });
}

Results measure(const Selection& selection, const Devices& devices, int rounds, bool check) {
  Results results;
  for (const Place place : {Place::kCpu, Place::kCuda}) {
    if (!selection.uses(place)) continue;
    results.ceilings[place] = devices.at(place)->measure_ceilings(selection.problem.dtype);
  }
  const Inputs inputs = make_inputs(selection.problem, selection.has_backward());
  std::map<Place, Workspace> workspaces;
  for (const Kernel* const kernel : selection.kernels) {
    workspaces.try_emplace(kernel->place, *devices.at(kernel->place), inputs);
    results.measurements.push_back({kernel, {}, {}, ""});
  }
  std::vector<Runner> runners;
  for (Measurement& measurement : results.measurements) {
    Workspace& workspace = workspaces.at(measurement.kernel->place);
    runners.push_back({measurement, workspace, 0});
    guarded(measurement, [&] {
      prepare(*measurement.kernel, workspace);
      if (check) measurement.comparisons = check_kernel(*measurement.kernel, workspace, inputs);
      runners.back().repeats = choose_repeats(runners.back());
    });
  }
  time_interleaved(runners, rounds);
  return results;
}

}  // namespace chunkattn::bench
