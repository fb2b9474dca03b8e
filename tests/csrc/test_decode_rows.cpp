// The rows of sequences that decode, over random steps: each token has the slot of its place in the
// row's block table, and a copy of the tables made of the changes holds them. Arrays have no spare
// element, for the sanitizers.
#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <stdexcept>
#include <vector>

#include "cache/decode_rows.h"
#include "check.h"

namespace nano_vllm::test {
namespace {

constexpr int32_t kBlockSize = 4;
constexpr int64_t kMaxRows = 5, kWidth = 8;

struct Trace {
  explicit Trace(uint32_t seed) : random(seed), window(seed % 2 == 0 ? 0 : draw(1, 12)) {}

  int32_t draw(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(random);
  }

  // With blocks for all of its tokens but the last, or for all if it joins a step.
  void add(bool joins = false) {
    DecodeRow row;
    row.num_tokens = draw(joins ? 1 : 2, 3 * kBlockSize);
    const int32_t num_computed = row.num_tokens - (joins ? 0 : 1);
    const int32_t num_blocks = (num_computed + kBlockSize - 1) / kBlockSize;
    if (rows.size() == kMaxRows || num_blocks > allocator.num_free()) return;
    row.max_num_tokens = draw(row.num_tokens + 1, static_cast<int32_t>(kWidth - 1) * kBlockSize);
    row.end_token_ids.assign(static_cast<size_t>(draw(0, 2)), draw(0, 70));
    row.block_table = allocator.allocate_many(num_blocks);
    rows.add(std::move(row));
  }

  void remove(const DecodeRow& row) {
    allocator.free_many({row.block_table.begin() + row.num_freed, row.block_table.end()});
    rows.remove(row.id);
  }

  void check_written(const DecodeStep& step) {
    const auto count = static_cast<int64_t>(step.ids.size());
    const int64_t padded = count + draw(0, 2);
    const auto size = static_cast<size_t>(padded);
    std::vector<int64_t> ids(size), positions(size), slots(size);
    std::vector<int32_t> starts(size + 1), lens(size), table_rows(static_cast<size_t>(count));
    rows.write_inputs(
        step, {ids.data(), positions.data(), slots.data(), starts.data(), lens.data(), padded});
    std::vector<TableChange> changes(static_cast<size_t>(count * kWidth));
    const int64_t num_changes =
        rows.write_table_changes(step, kWidth, sent.data(), table_rows.data(), changes.data(),
                                 static_cast<int64_t>(changes.size()));
    for (int64_t i = 0; i < num_changes; ++i) {
      copy[static_cast<size_t>(changes[i].place)] = changes[i].block;
    }
    std::vector<int32_t> tables(static_cast<size_t>(count * kWidth));
    rows.write_tables(step, tables.data(), kWidth, kWidth);
    rows.visit(step, [&](int64_t place, const DecodeRow& row) {
      const int32_t position = row.num_tokens - 1 + step.lead;
      const int64_t block = row.block_table[static_cast<size_t>(position / kBlockSize)];
      // What the token sees is the row's own, in the step under way too, and little beyond it.
      const int32_t seen = window == 0 ? 0 : std::max(row.num_tokens - window, 0);
      CHECK(row.num_freed <= seen / kBlockSize);
      if (taken[row.id] > 0) CHECK(row.num_freed >= seen / kBlockSize - 1);
      CHECK(positions[place] == position && lens[place] == position + 1);
      CHECK(slots[place] == block * kBlockSize + position % kBlockSize);
      CHECK(starts[place] == place && table_rows[place] == row.table_row);
      const auto equal = [&](const int32_t* table) {
        return std::equal(row.block_table.begin(), row.block_table.end(), table);
      };
      CHECK(equal(&tables[static_cast<size_t>(place * kWidth)]));
      CHECK(equal(&copy[static_cast<size_t>(row.table_row * kWidth)]));
    });
    for (int64_t place = count; place < padded; ++place) {
      CHECK(slots[place] == -1 && lens[place] == 0 && starts[place + 1] == count);
    }
  }

  void take(const DecodeStep& step) {
    std::vector<const DecodeRow*> over;
    rows.visit(step, [&](int64_t, DecodeRow& row) {
      const int32_t token = draw(0, 70);
      const auto& ends = row.end_token_ids;
      const bool is_end = std::find(ends.begin(), ends.end(), token) != ends.end();
      const bool ended = row.take(token);
      CHECK(ended == (is_end || row.num_tokens >= row.max_num_tokens));
      if (ended) over.push_back(&row);
    });
    for (const DecodeRow* row : over) remove(*row);
  }

  void run() {
    const auto on_block = [&](const DecodeRow& row, int32_t block) {
      CHECK(row.block_table.back() == block);
      ++taken[row.id];
    };
    const auto on_freed = [](const DecodeRow& row) { CHECK(row.num_freed > 0); };
    for (int turn = 0; turn < 200; ++turn) {
      if (draw(0, 2) == 0) add();
      DecodeStep step = rows.schedule(kMaxRows, {}, on_block, on_freed);
      check_written(step);
      const int64_t newest = rows.ids().empty() ? 0 : rows.ids().back();
      if (draw(0, 2) == 0) add(true);
      if (!rows.ids().empty() && rows.ids().back() > newest) step.joined = {rows.ids().back()};
      DecodeStep ahead;
      const bool is_ahead =
          draw(0, 1) == 0 && rows.schedule_ahead(step, kMaxRows, ahead, on_block, on_freed);
      if (is_ahead) {
        check_written(ahead);
        CHECK(ahead.ids.size() == ahead.ahead_rows.size());
        for (size_t place = 0; place < ahead.ids.size(); ++place) {
          const auto before = static_cast<size_t>(ahead.ahead_rows[place]);
          const bool has_joined = before >= step.ids.size();
          const auto& ids = has_joined ? step.joined : step.ids;
          CHECK(ids[has_joined ? before - step.ids.size() : before] == ahead.ids[place]);
        }
      }
      const DecodeStep joined{step.joined, 0, {}, {}};
      if (is_ahead && draw(0, 4) == 0) {  // both fail, and are scheduled again
        rows.visit(joined, [&](int64_t, const DecodeRow& row) { remove(row); });
        continue;
      }
      take(step);
      take(joined);
      if (is_ahead) take(ahead);  // without those that have just gone
      // Where the pool is dry, somebody has to go.
      if (allocator.num_free() == 0) {
        rows.visit(step, [&](int64_t place, const DecodeRow& row) {
          if (place == 0) remove(row);
        });
      }
      allocator.check_integrity();
      CHECK(rows.num_blocks() == allocator.num_active());
    }
  }

  std::mt19937 random;
  int32_t window;
  BlockAllocator allocator{20, kBlockSize};
  DecodeRows rows{allocator, kMaxRows, window};
  std::map<int64_t, int> taken;  // blocks, by row
  std::vector<SentRow> sent = std::vector<SentRow>(kMaxRows);
  std::vector<int32_t> copy = std::vector<int32_t>(kMaxRows * kWidth);
};

template <class Call>
bool throws(Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void test_refusals() {
  BlockAllocator allocator(4, kBlockSize);
  DecodeRows rows(allocator, 1);
  DecodeRow row;
  row.num_tokens = 3;
  row.block_table = {allocator.allocate()};
  const int64_t id = rows.add(row).id;
  CHECK(throws([&] { rows.add(row); }));
  const DecodeStep step =
      rows.schedule(9, {}, [](const DecodeRow&, int32_t) {}, [](const DecodeRow&) {});
  CHECK(step.ids.size() == 1);
  rows.remove(id);
  CHECK(throws([&] { rows.remove(id); }));
  CHECK(throws([&] { rows.at(id); }));
  int32_t table[kWidth];
  CHECK(throws([&] { rows.write_tables(step, table, kWidth, kWidth); }));
  row.num_tokens = 6;
  CHECK(throws([&] { rows.add(row); }));
}

}  // namespace
}  // namespace nano_vllm::test

int main() {
  using namespace nano_vllm::test;
  for (uint32_t seed = 0; seed < 50; ++seed) Trace(seed).run();
  test_refusals();
  return report_checks();
}
