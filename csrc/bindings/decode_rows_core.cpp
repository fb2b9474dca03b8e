// DecodeRows and DecodeStep of nano_vllm._core: rows that keep the Python lists of their sequences
// up to date.
#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "bindings/core_arguments.h"
#include "cache/decode_rows.h"

namespace nano_vllm {
namespace {

// What Python sees of a row.
struct Owner {
  py::object scheduled;
  py::list token_ids, block_table, block_hashes;
  py::bytes root;
};

Owner& owner_of(const DecodeRow& row) { return *static_cast<Owner*>(row.owner); }

class Rows : public DecodeRows {
 public:
  Rows(const py::object& allocator, int64_t max_rows, int64_t sliding_window)
      : DecodeRows(allocator.cast<BlockAllocator&>(), max_rows, sliding_window),
        allocator_object_(allocator) {}
  Rows(const Rows&) = delete;
  ~Rows() {
    for (const int64_t id : ids()) delete static_cast<Owner*>(remove(id));
  }

  // Of the last step.
  std::vector<int64_t> listed_ids;
  py::list listed;

 private:
  py::object allocator_object_;
};

struct Step {
  std::shared_ptr<Rows> rows;
  DecodeStep step;
  py::list scheduled;
};

int64_t add(Rows& rows, py::object scheduled, py::list token_ids, py::list block_table,
            py::list block_hashes, int64_t max_num_tokens, int64_t min_num_tokens,
            const py::iterable& end_token_ids, bool is_followed, py::bytes root,
            int32_t num_freed_blocks) {
  check(token_ids.size() > 0, "a row needs a token");
  DecodeRow row;
  row.num_tokens = static_cast<int32_t>(token_ids.size());
  row.last_token = item_at("token id", token_ids.ptr(), row.num_tokens - 1);
  row.max_num_tokens = static_cast<int32_t>(std::min(max_num_tokens, kMaxInt32));
  row.min_num_tokens = static_cast<int32_t>(std::min(min_num_tokens, kMaxInt32));
  row.is_followed = is_followed;
  for (const py::handle token : end_token_ids) row.end_token_ids.push_back(token.cast<int32_t>());
  row.block_table = to_blocks(block_table);
  row.num_freed = num_freed_blocks;
  auto owner = std::make_unique<Owner>(Owner{std::move(scheduled), std::move(token_ids),
                                             std::move(block_table), std::move(block_hashes),
                                             std::move(root)});
  DecodeRow& added = rows.add(std::move(row));
  added.owner = owner.release();
  return added.id;
}

int64_t peak_growth(const Rows& rows, int64_t horizon, const py::list& others) {
  std::vector<GrowingSequence> growing;
  for (const py::handle each : others) {
    const auto [num_tokens, max_num_tokens, num_blocks, num_freed] =
        each.cast<std::tuple<int64_t, int64_t, int64_t, int64_t>>();
    check(num_tokens > 0 && num_freed >= 0 && num_blocks >= num_freed,
          "a growing sequence must have tokens, got ", num_tokens, " in ", num_blocks,
          " blocks, of which ", num_freed, " are freed");
    growing.push_back({num_tokens, max_num_tokens, num_blocks, num_freed});
  }
  return rows.peak_growth(horizon, growing);
}

void on_block(const DecodeRow& row, int32_t block) {
  owner_of(row).block_table.append(py::int_(block));
}

void on_freed(const DecodeRow& row) {
  owner_of(row).scheduled.attr("sequence").attr("num_freed_blocks") = row.num_freed;
}

// With the rows' `scheduled` in their order: the same list as before where these are the same rows.
Step make_step(std::shared_ptr<Rows> rows, DecodeStep step) {
  if (step.ids != rows->listed_ids) {
    py::list scheduled(step.ids.size());
    rows->visit(step, [&](int64_t place, const DecodeRow& row) {
      PyList_SET_ITEM(scheduled.ptr(), place, owner_of(row).scheduled.inc_ref().ptr());
    });
    rows->listed_ids = step.ids;
    rows->listed = std::move(scheduled);
  }
  py::list scheduled = rows->listed;
  return {std::move(rows), std::move(step), std::move(scheduled)};
}

Step schedule(std::shared_ptr<Rows> rows, int64_t max_rows, const py::list& under_way) {
  std::vector<const DecodeStep*> steps;
  for (const py::handle each : under_way) steps.push_back(&each.cast<const Step&>().step);
  DecodeStep step = rows->schedule(max_rows, steps, on_block, on_freed);
  return make_step(std::move(rows), std::move(step));
}

std::unique_ptr<Step> schedule_ahead(std::shared_ptr<Rows> rows, const Step& behind,
                                     int64_t max_rows) {
  DecodeStep step;
  if (!rows->schedule_ahead(behind.step, max_rows, step, on_block, on_freed)) return nullptr;
  return std::make_unique<Step>(make_step(std::move(rows), std::move(step)));
}

int32_t to_token(const py::handle& token) {
  const long value = PyLong_AsLong(token.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  check(value <= kMaxInt32, "token id must be below 2^31, got ", value);
  return static_cast<int32_t>(std::max(value, -1L));
}

void take(Rows& rows, int64_t id, const py::int_& token_id) {
  const int32_t token = to_token(token_id);
  check(token >= 0, "token id must not be below 0, got ", token);
  DecodeRow& row = rows.at(id);
  row.take(token);
  owner_of(row).token_ids.append(token_id);
}

py::list advance(Rows& rows, const Step& step, const py::list& token_ids, bool commits) {
  check(token_ids.size() >= step.step.ids.size(), "token_ids must have one entry for each of the ",
        step.step.ids.size(), " rows, got ", token_ids.size());
  const int32_t block_size = rows.allocator().block_size();
  py::list noticed;
  rows.visit(step.step, [&](int64_t place, DecodeRow& row) {
    const py::handle token = PyList_GET_ITEM(token_ids.ptr(), place);
    const int32_t value = to_token(token);
    if (value < 0) {
      noticed.append(place);
      return;
    }
    Owner& owner = owner_of(row);
    const bool ends = row.take(value);
    owner.token_ids.append(token);
    const int32_t num_computed = row.num_tokens - 1;
    if (commits && num_computed % block_size == 0) {
      commit_blocks(rows.allocator(), owner.block_table, owner.block_hashes, owner.token_ids,
                    num_computed, owner.root);
    }
    if (ends || row.is_followed) noticed.append(place);
  });
  return noticed;
}

int64_t write_inputs(const Step& self, py::array out_input_ids, py::array out_positions,
                     py::array out_slot_mapping, py::array out_query_start_loc,
                     py::array out_seq_lens) {
  const int64_t padded_size = out_input_ids.size();
  check(padded_size >= static_cast<int64_t>(self.step.ids.size()), "a step of ",
        self.step.ids.size(), " rows does not fit arrays of ", padded_size);
  return self.rows->write_inputs(
      self.step, {output<int64_t>("out_input_ids", out_input_ids, {padded_size}),
                  output<int64_t>("out_positions", out_positions, {padded_size}),
                  output<int64_t>("out_slot_mapping", out_slot_mapping, {padded_size}),
                  output<int32_t>("out_query_start_loc", out_query_start_loc, {padded_size + 1}),
                  output<int32_t>("out_seq_lens", out_seq_lens, {padded_size}), padded_size});
}

void write_tables(const Step& self, py::array out) {
  int32_t* tables = output<int32_t>("out", out, {static_cast<int64_t>(self.step.ids.size()), -1});
  self.rows->write_tables(self.step, tables, out.strides(0) / static_cast<int64_t>(sizeof(int32_t)),
                          out.shape(1));
}

int64_t write_table_changes(const Step& self, int64_t max_blocks_per_seq, py::array sent,
                            py::array out_table_rows, py::array out_changes) {
  static_assert(sizeof(SentRow) == 2 * sizeof(int64_t));
  static_assert(sizeof(TableChange) == 2 * sizeof(int32_t));
  auto* known = reinterpret_cast<SentRow*>(output<int64_t>("sent", sent, {-1, 2}));
  auto* changes =
      reinterpret_cast<TableChange*>(output<int32_t>("out_changes", out_changes, {-1, 2}));
  check(sent.strides(0) == sizeof(SentRow) && out_changes.strides(0) == sizeof(TableChange),
        "sent and out_changes must be contiguous");
  int32_t* table_rows = output<int32_t>("out_table_rows", out_table_rows, {-1});
  const auto num_seqs = static_cast<int64_t>(self.step.ids.size());
  check(out_table_rows.size() >= num_seqs, "a step of ", num_seqs, " rows does not fit arrays of ",
        out_table_rows.size());
  check(sent.shape(0) >= self.rows->max_rows() && sent.shape(0) * max_blocks_per_seq <= kMaxInt32,
        "sent must have an entry for each of the ", self.rows->max_rows(), " rows, got ",
        sent.shape(0));
  std::fill(table_rows + num_seqs, table_rows + out_table_rows.size(), 0);
  return self.rows->write_table_changes(self.step, max_blocks_per_seq, known, table_rows, changes,
                                        out_changes.shape(0));
}

int64_t find_prefixes(const Step& self, int64_t min_saved_tokens, py::array out) {
  const auto num_seqs = static_cast<int64_t>(self.step.ids.size());
  int32_t* leaders = output<int32_t>("out", out, {2, -1});
  const int64_t padded_size = out.shape(1);
  check(padded_size >= num_seqs, "a step of ", num_seqs, " rows does not fit arrays of ",
        padded_size);
  int32_t* lens = leaders + out.strides(0) / static_cast<int64_t>(sizeof(int32_t));
  std::fill(leaders + num_seqs, leaders + padded_size, 0);
  std::fill(lens + num_seqs, lens + padded_size, 0);
  return self.rows->find_shared_prefixes(self.step, min_saved_tokens, leaders, lens);
}

}  // namespace

void bind_decode_rows(py::module_& module) {
  py::class_<Step>(module, "DecodeStep")
      .def("__len__", [](const Step& self) { return self.step.ids.size(); })
      .def_readonly("scheduled", &Step::scheduled)
      .def_property_readonly("num_missing", [](const Step& self) { return self.step.num_missing; })
      .def_property_readonly("ahead_rows",
                             [](const Step& self) { return to_list(self.step.ahead_rows); })
      .def(
          "join", [](Step& self, int64_t row_id) { self.step.joined.push_back(row_id); },
          py::arg("row_id"))
      .def("write_inputs", &write_inputs, py::arg("out_input_ids"), py::arg("out_positions"),
           py::arg("out_slot_mapping"), py::arg("out_query_start_loc"), py::arg("out_seq_lens"))
      .def("write_tables", &write_tables, py::arg("out"))
      .def("write_table_changes", &write_table_changes, py::arg("max_blocks_per_seq"),
           py::arg("sent"), py::arg("out_table_rows"), py::arg("out_changes"))
      .def("find_shared_prefixes", &find_prefixes, py::arg("min_saved_tokens"), py::arg("out"));
  py::class_<Rows, std::shared_ptr<Rows>>(module, "DecodeRows")
      .def(py::init<py::object, int64_t, int64_t>(), py::arg("allocator"), py::arg("max_rows"),
           py::arg("sliding_window") = 0)
      .def("__len__", &Rows::size)
      .def_property_readonly("num_blocks", &Rows::num_blocks)
      .def("peak_growth", &peak_growth, py::arg("horizon"), py::arg("others"))
      .def("add", &add, py::arg("scheduled"), py::arg("token_ids"), py::arg("block_table"),
           py::arg("block_hashes"), py::arg("max_num_tokens"), py::arg("min_num_tokens"),
           py::arg("end_token_ids"), py::arg("is_followed"), py::arg("root") = py::bytes(),
           py::arg("num_freed_blocks") = 0)
      .def(
          "remove",
          [](Rows& self, int64_t row_id) { delete static_cast<Owner*>(self.remove(row_id)); },
          py::arg("row_id"))
      .def("schedule", &schedule, py::arg("max_rows"), py::arg("under_way") = py::list())
      .def("schedule_ahead", &schedule_ahead, py::arg("behind"), py::arg("max_rows"))
      .def("take", &take, py::arg("row_id"), py::arg("token_id"))
      .def("advance", &advance, py::arg("step"), py::arg("token_ids"), py::arg("commits"));
}

}  // namespace nano_vllm
