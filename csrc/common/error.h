// Errors of the torch-free code: a message built from its parts, thrown. The bindings turn it into
// a Python exception. Checks that look at device data never stand here: a launcher does not
// synchronise.
#pragma once

#include <sstream>
#include <stdexcept>

namespace nano_vllm {

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// check(n > 0, "n must be positive, got ", n)
template <class... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

}  // namespace nano_vllm
