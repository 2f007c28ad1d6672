// Plain checks for tests that are one executable each: CHECK as often as needed, then return report() from main.
#pragma once

#include <iostream>
#include <sstream>
#include <string>

namespace chunkattn::test {

inline long checks = 0;
inline long failures = 0;

inline void check(bool passed, const char* condition, const char* file, int line, const std::string& context) {
  ++checks;
  if (passed) return;
  constexpr long kMostShown = 20;
  if (++failures <= kMostShown)
    std::cerr << file << ":" << line << ": " << condition << " fails with " << context << "\n";
}

template <typename... Values>
std::string describe(const Values&... values) {
  std::ostringstream stream;
  ((stream << values), ...);
  return stream.str();
}

// The exit status. A run that checked nothing has failed.
inline int report() {
  std::cerr << checks << " checks, " << failures << " failures\n";
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace chunkattn::test

// The values after the condition are printed when it is false: CHECK(a == b, "a ", a, ", b ", b).
#define CHECK(condition, ...)                                                                \
  do {                                                                                       \
    const bool passed = static_cast<bool>(condition);                                        \
    chunkattn::test::check(passed, #condition, __FILE__, __LINE__,                           \
                           passed ? std::string() : chunkattn::test::describe(__VA_ARGS__)); \
  } while (false)
