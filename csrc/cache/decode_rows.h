// The sequences that decode, a row of numbers each, kept from step to step: what a step needs that
// computes one token of each of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cache/block_allocator.h"

namespace nano_vllm {

// All tokens of the sequence but the last have been computed, or the step that computes them all
// has been scheduled; its blocks are its own from the last token's slot on.
struct DecodeRow {
  int64_t id = 0;              // rises from row to row
  int32_t table_row = 0;       // among the device's block tables; its own as long as it is here
  int32_t num_tokens = 0;      // known, prompt and output
  int32_t last_token = 0;      // of them
  int32_t max_num_tokens = 0;  // the sequence ends with so many
  int32_t min_num_tokens = 0;  // an end token counts only beyond so many
  bool is_followed = false;    // somebody looks at each of its tokens
  bool is_gone = false;
  int32_t num_freed = 0;   // leading blocks that lie behind the window and are not its own any more
  int32_t num_shared = 0;  // leading blocks that others had too when the row was added
  int32_t last_block = 0;  // of block_table, here so that most steps read nothing but the row
  std::vector<int32_t> block_table;
  uint64_t end_token_filter = 0;  // bit `token % 64` of each end token: most others are none
  std::vector<int32_t> end_token_ids;
  void* owner = nullptr;  // the caller's

  // Appends a token; whether the sequence ends with it.
  bool take(int32_t token);
};

// What one step computes: of each row the last token it knows, or one further.
struct DecodeStep {
  std::vector<int64_t> ids;         // of the rows, rising
  int32_t lead = 0;                 // tokens that the rows do not know yet
  std::vector<int32_t> ahead_rows;  // with a lead: for each row, its place in the step before
  std::vector<int64_t> joined;  // rows whose first tokens end in the step, by other means; behind
                                // all others, in its places too
  int64_t num_missing = 0;      // rows that were to take part, and had no slot
};

// A step's inputs, padded with sequences that have nothing to do.
struct DecodeInputs {
  int64_t* input_ids;        // [padded_size]; 0 where the token is not known yet
  int64_t* positions;        // [padded_size]
  int64_t* slot_mapping;     // [padded_size]; -1 in the padding
  int32_t* query_start_loc;  // [padded_size + 1]
  int32_t* seq_lens;         // [padded_size]; 0 in the padding
  int64_t padded_size;
};

// What a copy of the block tables elsewhere holds of a table row.
struct SentRow {
  int64_t id;  // of the row that it was sent for
  int64_t num_blocks;
};

// A block that such a copy does not hold yet, and its place in it.
struct TableChange {
  int32_t place, block;
};

// A sequence that is no row yet: it takes its blocks as a row of so many tokens does.
struct GrowingSequence {
  int64_t num_tokens, max_num_tokens, num_blocks, num_freed;
};

// Steps are taken in the order in which they were scheduled, and prepared before the next one is
// taken in. Rows may go at any time: what comes of them in a step under way is dropped.
//
// With a sliding window, a row gives back the blocks that none of its tokens to come attends to,
// whenever it takes one: so many tokens behind the last one known, as the step under way may have
// to be taken again. They stay in its table, where nobody reads them.
//
// Invariants: the rows' ids rise; a row's block_table covers num_tokens - 1 tokens at least and
//     num_tokens + 1 at most, in whole blocks.
class DecodeRows {
 public:
  // The allocator must outlive it. sliding_window: tokens that a query sees in any layer, itself
  // included; 0 for all.
  DecodeRows(BlockAllocator& allocator, int64_t max_rows, int64_t sliding_window = 0);

  int64_t size() const { return static_cast<int64_t>(rows_.size()) - num_gone_; }
  int64_t max_rows() const { return max_rows_; }
  // That the rows hold.
  int64_t num_blocks() const { return num_blocks_; }
  // The most blocks that the rows, and these others, will have taken beyond what those of them have
  // given back that reach their length, at any of the next `horizon` steps.
  int64_t peak_growth(int64_t horizon, const std::vector<GrowingSequence>& others) const;
  std::vector<int64_t> ids() const;
  BlockAllocator& allocator() { return *allocator_; }

  // Behind all others. Sets id and table_row; throws std::invalid_argument if there is no place.
  DecodeRow& add(DecodeRow row);
  // Returns its owner; throws std::invalid_argument if there is no such row.
  void* remove(int64_t id);
  // Throws std::invalid_argument if there is no such row.
  DecodeRow& at(int64_t id);

  // The step of as many rows, the oldest first, as have a slot for their last token, max_rows at
  // most, without those of steps under way. Calls on_block(row, block) for blocks that are taken,
  // on_freed(row) where some are given back.
  template <class OnBlock, class OnFreed>
  DecodeStep schedule(int64_t max_rows, const std::vector<const DecodeStep*>& under_way,
                      OnBlock&& on_block, OnFreed&& on_freed) {
    compact();
    DecodeStep step;
    step.ids.reserve(rows_.size());
    for (DecodeRow& row : rows_) {
      if (static_cast<int64_t>(step.ids.size()) + step.num_missing >= max_rows) break;
      if (is_part_of(under_way, row)) continue;
      const bool grows = needs_block(row, 0);
      if (grows && free_behind_window(row)) on_freed(row);
      if (step.num_missing > 0 || (grows && allocator_->num_free() == 0)) {
        ++step.num_missing;  // as are all behind it
        continue;
      }
      if (grows) on_block(row, take_block(row));
      step.ids.push_back(row.id);
    }
    return step;
  }

  // The step of all rows but those that reach their length with the step before, whose tokens are
  // not known yet. False, and no block is taken, where a row is not part of that step, blocks do
  // not suffice or more than max_rows stay.
  template <class OnBlock, class OnFreed>
  bool schedule_ahead(const DecodeStep& behind, int64_t max_rows, DecodeStep& step,
                      OnBlock&& on_block, OnFreed&& on_freed) {
    compact();
    int64_t num_going = 0, num_blocks = 0;
    step = {{}, 1, {}, {}, 0};
    const auto go_on = [&](int64_t place, DecodeRow& row) {
      ++num_going;
      if (row.num_tokens + 1 >= row.max_num_tokens) return;
      if (needs_block(row, 1)) {
        ++num_blocks;
        if (free_behind_window(row)) on_freed(row);
      }
      step.ids.push_back(row.id);
      step.ahead_rows.push_back(static_cast<int32_t>(place));
    };
    visit(behind, go_on);
    const auto num_before = static_cast<int64_t>(behind.ids.size());
    visit({behind.joined, 0, {}, {}, 0},
          [&](int64_t place, DecodeRow& row) { go_on(num_before + place, row); });
    if (num_going < size() || num_blocks > allocator_->num_free() ||
        static_cast<int64_t>(step.ids.size()) > max_rows) {
      return false;
    }
    visit(step, [&](int64_t, DecodeRow& row) {
      if (needs_block(row, 1)) on_block(row, take_block(row));
    });
    return true;
  }

  // Calls with (place in the step, row) for each row that is still here. Returns how many are.
  template <class Call>
  int64_t visit(const DecodeStep& step, Call&& call) {
    int64_t count = 0;
    auto row = rows_.begin();
    for (size_t place = 0; place < step.ids.size(); ++place) {
      while (row != rows_.end() && row->id < step.ids[place]) ++row;
      if (row == rows_.end()) break;
      if (row->id != step.ids[place] || row->is_gone) continue;
      call(static_cast<int64_t>(place), *row);
      ++count;
    }
    return count;
  }

  // These throw std::invalid_argument, and what they have written is of no use, where a row of the
  // step is gone.

  // Returns the greatest seq_len.
  int64_t write_inputs(const DecodeStep& step, const DecodeInputs& inputs);
  // out: [rows of the step, width]; 0 past a row's blocks.
  void write_tables(const DecodeStep& step, int32_t* out, int64_t stride, int64_t width);
  // Which rows of a copy [max_rows, width] of the block tables are the step's, and what it lacks of
  // them, which then counts as sent.
  //   sent        [max_rows]; zeros for a copy that holds nothing
  //   table_rows  [rows of the step]
  // Returns how many changes were written; throws std::invalid_argument where `capacity` is less.
  int64_t write_table_changes(const DecodeStep& step, int64_t width, SentRow* sent,
                              int32_t* table_rows, TableChange* out, int64_t capacity);
  // As `find_shared_prefixes`, for the step; where it returns 0, nothing may be written.
  int64_t find_shared_prefixes(const DecodeStep& step, int64_t min_saved_tokens, int32_t* leaders,
                               int32_t* lens);

 private:
  void compact();
  // Whether a step computes the row's last token, as one of its rows or not.
  static bool is_part_of(const std::vector<const DecodeStep*>& steps, const DecodeRow& row) {
    return std::any_of(steps.begin(), steps.end(), [&](const DecodeStep* step) {
      return std::binary_search(step->ids.begin(), step->ids.end(), row.id) ||
             std::binary_search(step->joined.begin(), step->joined.end(), row.id);
    });
  }
  template <class Call>
  void visit_all(const DecodeStep& step, Call&& call);
  // Whether there is no slot yet for the token `lead` places behind the last one known.
  bool needs_block(const DecodeRow& row, int32_t lead) const {
    return (row.num_tokens - 1 + lead) / block_size_ ==
           static_cast<int32_t>(row.block_table.size());
  }
  int32_t take_block(DecodeRow& row);
  // Blocks that the last of so many tokens does not see, nor any behind it.
  int64_t num_behind_window(int64_t num_tokens) const {
    if (sliding_window_ == 0) return 0;
    return std::max<int64_t>(num_tokens - sliding_window_, 0) / block_size_;
  }
  bool free_behind_window(DecodeRow& row);

  BlockAllocator* allocator_;
  int32_t block_size_;
  int64_t sliding_window_;
  int64_t max_rows_;
  int64_t next_id_ = 1;
  int64_t num_gone_ = 0;
  int64_t num_blocks_ = 0;
  std::vector<DecodeRow> rows_;
  std::unordered_map<int32_t, int64_t> num_rows_of_head_;  // by the first block of their tables
  std::vector<int32_t> free_table_rows_;
};

}  // namespace nano_vllm
