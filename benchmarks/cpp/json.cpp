#include "json.h"

#include <charconv>
#include <cmath>

namespace chunkattn::bench {

std::string json_string(std::string_view text) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string quoted = "\"";
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (code < 0x20) {
      quoted += "\\u00";
      quoted += kDigits[code / 16];
      quoted += kDigits[code % 16];
    } else {
      quoted += c;
    }
  }
  return quoted + '"';
}

std::string json_string_or_null(std::string_view text) { return text.empty() ? "null" : json_string(text); }

std::string json_number(double value) {
  if (!std::isfinite(value)) return "null";
  char text[32];
  return {text, std::to_chars(text, text + sizeof(text), value).ptr};
}

std::string json_bool(bool value) { return value ? "true" : "false"; }

std::string json_object(const std::vector<std::pair<std::string, std::string>>& members) {
  std::string object = "{";
  for (const auto& [name, value] : members)
    object += (object.size() > 1 ? ", " : "") + json_string(name) + ": " + value;
  return object + "}";
}

std::string json_array(const std::vector<std::string>& elements, std::string_view separator) {
  std::string array = "[";
  for (const std::string& element : elements) {
    if (array.size() > 1) array += separator;
    array += element;
  }
  return array + "]";
}

}  // namespace chunkattn::bench
