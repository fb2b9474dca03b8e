#include "cache/decode_rows.h"

#include <algorithm>

#include "cache/shared_prefix.h"
#include "common/error.h"

namespace nano_vllm {

bool DecodeRow::take(int32_t token) {
  last_token = token;
  ++num_tokens;
  if (num_tokens >= max_num_tokens) return true;
  return (end_token_filter >> (token % 64) & 1) != 0 && num_tokens > min_num_tokens &&
         std::find(end_token_ids.begin(), end_token_ids.end(), token) != end_token_ids.end();
}

DecodeRows::DecodeRows(BlockAllocator& allocator, int64_t max_rows, int64_t sliding_window)
    : allocator_(&allocator),
      block_size_(allocator.block_size()),
      sliding_window_(sliding_window),
      max_rows_(max_rows) {
  check(sliding_window >= 0, "sliding_window must be at least 0, got ", sliding_window);
  check(max_rows > 0 && max_rows < INT32_MAX, "max_rows must be in [1, ", INT32_MAX, "), got ",
        max_rows);
  rows_.reserve(static_cast<size_t>(max_rows));
  for (int64_t row = max_rows; row-- > 0;) free_table_rows_.push_back(static_cast<int32_t>(row));
}

std::vector<int64_t> DecodeRows::ids() const {
  std::vector<int64_t> ids;
  for (const DecodeRow& row : rows_) {
    if (!row.is_gone) ids.push_back(row.id);
  }
  return ids;
}

DecodeRow& DecodeRows::add(DecodeRow row) {
  check(!free_table_rows_.empty(), "all ", size(), " rows are taken");
  const int64_t num_slots = static_cast<int64_t>(row.block_table.size()) * block_size_;
  check(row.num_tokens > 0 && num_slots > 0 && num_slots >= row.num_tokens - 1, "a row of ",
        row.num_tokens, " tokens has blocks for ", num_slots);
  check(row.num_freed >= 0 && row.num_freed <= num_behind_window(row.num_tokens), "a row of ",
        row.num_tokens, " tokens lacks its first ", row.num_freed, " blocks");
  row.id = next_id_++;
  row.table_row = free_table_rows_.back();
  free_table_rows_.pop_back();
  for (const int32_t token : row.end_token_ids) row.end_token_filter |= uint64_t{1} << (token % 64);
  row.last_block = row.block_table.back();
  const auto is_shared = [&](int32_t block) { return allocator_->ref_count(block) > 1; };
  row.num_shared = static_cast<int32_t>(
      std::find_if_not(row.block_table.begin() + row.num_freed, row.block_table.end(), is_shared) -
      row.block_table.begin());
  ++num_rows_of_head_[row.block_table[0]];
  num_blocks_ += static_cast<int64_t>(row.block_table.size()) - row.num_freed;
  rows_.push_back(std::move(row));
  return rows_.back();
}

int64_t DecodeRows::peak_growth(int64_t horizon, const std::vector<GrowingSequence>& others) const {
  check(horizon >= 0 && horizon < INT32_MAX, "horizon must be in [0, ", INT32_MAX, "), got ",
        horizon);
  std::vector<int64_t> change(static_cast<size_t>(horizon) + 1);
  const auto grow = [&](GrowingSequence sequence, int64_t num_kept) {
    // It takes part in so many steps; step `slots` is the first without a slot for it.
    const int64_t end = std::max<int64_t>(sequence.max_num_tokens - sequence.num_tokens, 0);
    int64_t slots = sequence.num_blocks * block_size_ - (sequence.num_tokens - 1);
    // What others keep frees no block.
    int64_t num_given_back = std::max(sequence.num_freed, num_kept);
    for (; slots <= horizon && slots < end; slots += block_size_) {
      const int64_t step = std::max<int64_t>(slots, 0);
      const int64_t behind = num_behind_window(sequence.num_tokens + step);
      const int64_t freed = std::max(behind - num_given_back, int64_t{0});
      change[static_cast<size_t>(step)] += 1 - freed;
      num_given_back += freed;
      ++sequence.num_blocks;
    }
    if (end <= horizon) change[static_cast<size_t>(end)] -= sequence.num_blocks - num_given_back;
  };
  for (const DecodeRow& row : rows_) {
    if (row.is_gone) continue;
    grow({row.num_tokens, row.max_num_tokens, static_cast<int64_t>(row.block_table.size()),
          row.num_freed},
         row.num_shared);
  }
  for (const GrowingSequence& sequence : others) grow(sequence, 0);
  int64_t growth = 0, peak = 0;
  for (const int64_t step : change) peak = std::max(peak, growth += step);
  return peak;
}

DecodeRow& DecodeRows::at(int64_t id) {
  const auto row = std::lower_bound(rows_.begin(), rows_.end(), id,
                                    [](const DecodeRow& r, int64_t i) { return r.id < i; });
  check(row != rows_.end() && row->id == id && !row->is_gone, "there is no row ", id);
  return *row;
}

void* DecodeRows::remove(int64_t id) {
  DecodeRow& row = at(id);
  row.is_gone = true;
  ++num_gone_;
  num_blocks_ -= static_cast<int64_t>(row.block_table.size()) - row.num_freed;
  free_table_rows_.push_back(row.table_row);
  const auto head = num_rows_of_head_.find(row.block_table[0]);
  if (--head->second == 0) num_rows_of_head_.erase(head);
  return row.owner;
}

template <class Call>
void DecodeRows::visit_all(const DecodeStep& step, Call&& call) {
  const int64_t count = visit(step, call);
  check(count == static_cast<int64_t>(step.ids.size()), "of the step's ", step.ids.size(), " rows ",
        count, " are still here: prepare it before another one is taken in");
}

int64_t DecodeRows::write_inputs(const DecodeStep& step, const DecodeInputs& inputs) {
  const auto num_seqs = static_cast<int64_t>(step.ids.size());
  int64_t max_seq_len = 0;
  visit_all(step, [&](int64_t place, const DecodeRow& row) {
    const int32_t position = row.num_tokens - 1 + step.lead;
    const auto index = static_cast<size_t>(position / block_size_);
    const int64_t block =
        index + 1 == row.block_table.size() ? row.last_block : row.block_table[index];
    inputs.input_ids[place] = step.lead == 0 ? row.last_token : 0;
    inputs.positions[place] = position;
    inputs.slot_mapping[place] = block * block_size_ + position % block_size_;
    inputs.query_start_loc[place] = static_cast<int32_t>(place);
    inputs.seq_lens[place] = position + 1;
    max_seq_len = std::max<int64_t>(max_seq_len, position + 1);
  });
  inputs.query_start_loc[num_seqs] = static_cast<int32_t>(num_seqs);
  for (int64_t place = num_seqs; place < inputs.padded_size; ++place) {
    inputs.input_ids[place] = inputs.positions[place] = 0;
    inputs.slot_mapping[place] = -1;
    inputs.query_start_loc[place + 1] = static_cast<int32_t>(num_seqs);
    inputs.seq_lens[place] = 0;
  }
  return max_seq_len;
}

void DecodeRows::write_tables(const DecodeStep& step, int32_t* out, int64_t stride, int64_t width) {
  visit_all(step, [&](int64_t place, const DecodeRow& row) {
    const auto num_blocks = static_cast<int64_t>(row.block_table.size());
    check(num_blocks <= width, "sequence ", place, " of the batch has ", num_blocks,
          " blocks, more than the ", width, " columns of the block tables");
    int32_t* const end =
        std::copy(row.block_table.begin(), row.block_table.end(), out + place * stride);
    std::fill_n(end, width - num_blocks, 0);
  });
}

int64_t DecodeRows::write_table_changes(const DecodeStep& step, int64_t width, SentRow* sent,
                                        int32_t* table_rows, TableChange* out, int64_t capacity) {
  int64_t count = 0;
  visit_all(step, [&](int64_t place, const DecodeRow& row) {
    table_rows[place] = row.table_row;
    SentRow& known = sent[row.table_row];
    if (known.id != row.id) known = {row.id, 0};
    const auto num_blocks = static_cast<int64_t>(row.block_table.size());
    check(num_blocks <= width, "sequence ", place, " of the batch has ", num_blocks,
          " blocks, more than the ", width, " columns of the block tables");
    check(count + num_blocks - known.num_blocks <= capacity, "more than ", capacity,
          " changes of the block tables");
    for (; known.num_blocks < num_blocks; ++known.num_blocks) {
      out[count++] = {static_cast<int32_t>(row.table_row * width + known.num_blocks),
                      row.block_table[static_cast<size_t>(known.num_blocks)]};
    }
  });
  return count;
}

int64_t DecodeRows::find_shared_prefixes(const DecodeStep& step, int64_t min_saved_tokens,
                                         int32_t* leaders, int32_t* lens) {
  // With a window nothing is read together; and tables begin with blocks that may be others'.
  if (sliding_window_ > 0) return 0;
  if (num_rows_of_head_.size() == rows_.size() - static_cast<size_t>(num_gone_)) return 0;
  std::vector<const int32_t*> tables(step.ids.size());
  std::vector<int32_t> seq_lens(step.ids.size());
  visit_all(step, [&](int64_t place, const DecodeRow& row) {
    tables[static_cast<size_t>(place)] = row.block_table.data();
    seq_lens[static_cast<size_t>(place)] = row.num_tokens + step.lead;
  });
  SharedPrefixParams params{};
  params.seq_lens = seq_lens.data();
  params.block_tables = tables.data();
  params.num_seqs = static_cast<int64_t>(step.ids.size());
  params.block_size = block_size_;
  params.min_saved_tokens = min_saved_tokens;
  params.leaders = leaders;
  params.lens = lens;
  return nano_vllm::find_shared_prefixes(params);
}

void DecodeRows::compact() {
  if (num_gone_ == 0) return;
  rows_.erase(
      std::remove_if(rows_.begin(), rows_.end(), [](const DecodeRow& row) { return row.is_gone; }),
      rows_.end());
  num_gone_ = 0;
}

int32_t DecodeRows::take_block(DecodeRow& row) {
  row.last_block = allocator_->allocate();
  row.block_table.push_back(row.last_block);
  ++num_blocks_;
  return row.last_block;
}

bool DecodeRows::free_behind_window(DecodeRow& row) {
  const auto num_behind = static_cast<int32_t>(num_behind_window(row.num_tokens));
  if (num_behind <= row.num_freed) return false;
  num_blocks_ -= num_behind - row.num_freed;
  for (; row.num_freed < num_behind; ++row.num_freed) {
    allocator_->free(row.block_table[static_cast<size_t>(row.num_freed)]);
  }
  return true;
}

}  // namespace nano_vllm
