// JSON text, byte by byte, and numbers that read back as they were.
#include <cstdlib>
#include <limits>

#include "check.h"
#include "json.h"

namespace {

using namespace chunkattn::bench;

void test_strings() {
  CHECK(json_string("") == "\"\"");
  CHECK(json_string("a \"b\" \\ /") == R"("a \"b\" \\ /")", json_string("a \"b\" \\ /"));
  CHECK(json_string("tab\tnewline\n\x1f") == R"("tab\u0009newline\u000a\u001f")", json_string("tab\tnewline\n\x1f"));
  CHECK(json_string({"\0", 1}) == R"("\u0000")", json_string({"\0", 1}));
  CHECK(json_string("\xc3\xa9") == "\"\xc3\xa9\"", json_string("\xc3\xa9"));  // UTF-8 as it is
  CHECK(json_string_or_null("") == "null");
  CHECK(json_string_or_null("a") == "\"a\"");
}

void test_numbers() {
  for (const double value : {0.0, -1.0, 0.1, 1.0 / 3, 8192.0, 1e300, -2.5e-308, 5e-324, 9007199254740993.0}) {
    CHECK(std::strtod(json_number(value).c_str(), nullptr) == value, json_number(value));
  }
  CHECK(json_number(8192) == "8192", json_number(8192));
  CHECK(json_number(0.1) == "0.1", json_number(0.1));
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double value : {infinity, -infinity, std::numeric_limits<double>::quiet_NaN()}) {
    CHECK(json_number(value) == "null", json_number(value));
  }
  CHECK(json_bool(true) == "true" && json_bool(false) == "false");
}

void test_containers() {
  CHECK(json_object({}) == "{}" && json_array({}) == "[]");
  const std::string array = json_array({json_number(1), json_string(","), "null"});
  CHECK(array == R"([1, ",", null])", array);
  const std::string object = json_object({{"a\"", array}, {"b", json_object({{"c", "true"}})}});
  CHECK(object == R"({"a\"": [1, ",", null], "b": {"c": true}})", object);
  CHECK(json_array({"1", "2"}, ",\n") == "[1,\n2]");
}

}  // namespace

int main() {
  test_strings();
  test_numbers();
  test_containers();
  return chunkattn::test::report();
}
