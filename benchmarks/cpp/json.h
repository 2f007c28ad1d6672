// JSON text of values. Values, objects and arrays are built of text that is JSON already.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace chunkattn::bench {

std::string json_string(std::string_view text);  // UTF-8
std::string json_string_or_null(std::string_view text);
std::string json_number(double value);  // the shortest text that reads back as the same number; null unless finite
std::string json_bool(bool value);
std::string json_object(const std::vector<std::pair<std::string, std::string>>& members);
std::string json_array(const std::vector<std::string>& elements, std::string_view separator = ", ");

}  // namespace chunkattn::bench
