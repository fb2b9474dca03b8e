// The whole test framework of the torch-free tests: CHECK counts and reports failures,
// report_checks() is what main returns.
#pragma once

#include <cstdio>

namespace nano_vllm::test {

struct CheckCount {
  long passed = 0, failed = 0;
};

inline CheckCount& check_count() {
  static CheckCount count;
  return count;
}

// Says at most so many failures: a kernel that is wrong everywhere needs one screen, not a million
// lines.
constexpr long kMaxReportedFailures = 20;

inline bool record_check(bool ok, const char* expression, const char* file, int line) {
  CheckCount& count = check_count();
  ++(ok ? count.passed : count.failed);
  if (!ok && count.failed <= kMaxReportedFailures) {
    std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", file, line, expression);
  }
  return ok;
}

inline int report_checks() {
  std::printf("%ld checks passed, %ld failed\n", check_count().passed, check_count().failed);
  return check_count().failed == 0 && check_count().passed > 0 ? 0 : 1;
}

}  // namespace nano_vllm::test

#define CHECK(expression) \
  ::nano_vllm::test::record_check(static_cast<bool>(expression), #expression, __FILE__, __LINE__)

// The statement must throw the exception type.
#define CHECK_THROWS(statement, Exception)                                                         \
  do {                                                                                             \
    bool thrown = false;                                                                           \
    try {                                                                                          \
      statement;                                                                                   \
    } catch (const Exception&) {                                                                   \
      thrown = true;                                                                               \
    }                                                                                              \
    ::nano_vllm::test::record_check(thrown, #statement " throws " #Exception, __FILE__, __LINE__); \
  } while (false)
