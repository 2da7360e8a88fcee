// SPDX-License-Identifier: Apache-2.0
// What all calls of vsa._C have in common, compiled once: their keywords, errors and methods.
#include "bind/fields.h"

namespace vsa::bind {

void refuse_type(py::handle x, const std::string& name, std::string allowed) {
  for (const Alias& alias : kAliases)
    if (allowed == alias.name) allowed = std::string(alias.definition) + " (" + alias.meaning + ")";
  const std::string given = py::str(py::type::handle_of(x).attr("__name__"));
  throw py::type_error(name + " must be " + allowed + ", but it is of type " + given);
}

void refuse_value(py::handle x, const std::string& name, const std::string& must) {
  throw py::value_error(name + " must " + must + ", but it is " + std::string(py::repr(x)));
}

Table::Table(const char* owner, std::initializer_list<Field> fields) : owner_(owner) {
  for (const Field& field : fields) {
    PyObject* key = PyUnicode_InternFromString(field.name);  // as long as the process lives
    if (key == nullptr) throw py::error_already_set();
    rows_.push_back({key, std::string(owner) + ": " + field.name, field});
  }
}

void Table::fill(void* call, const py::kwargs& given) const {
  for (const Row& row : rows_) {
    PyObject* value = PyDict_GetItemWithError(given.ptr(), row.key);
    if (value == nullptr) throw py::type_error(row.full_name + " is missing");
    row.field.read(row.field.at(call), value, row.full_name);
  }
  if (given.size() != rows_.size()) refuse_unknown(given);
}

py::dict Table::types() const {
  py::dict types;
  for (const Row& row : rows_) types[row.field.name] = row.field.type();
  return types;
}

std::vector<LinkedField> Table::links() const {
  std::vector<LinkedField> links;
  for (const Row& row : rows_)
    if (row.field.link != nullptr) links.push_back({row.field.at, row.field.link});
  return links;
}

void Table::refuse_unknown(const py::kwargs& given) const {
  const py::dict known = types();
  for (const auto& [name, value] : given)
    if (!known.contains(name))
      throw py::type_error(owner_ + " has no field " + std::string(py::str(name)) +
                           ", its fields are " +
                           std::string(py::str(", ").attr("join")(known).cast<std::string>()));
  throw std::logic_error(owner_ + ": a field stands twice in its table");
}

namespace {

const void* read_self(const Runs& runs, py::handle self) {
  try {
    return runs.read(self);
  } catch (const py::cast_error&) {
    throw py::reference_cast_error();  // a TypeError with the arguments that are allowed
  }
}

}  // namespace

void bind_methods(py::handle bound, const MethodNames& names, const Runs& runs) {
  const auto bind = [bound](const char* name, auto method, const auto&... extra) {
    bound.attr(name) =
        py::cpp_function(std::move(method), py::name(name), py::is_method(bound), extra...);
  };
  bind(
      names.launch,
      [runs](py::handle self, int device, uintptr_t stream) {
        const void* call = read_self(runs, self);
        const py::gil_scoped_release release;
        raise_if(runs.launch(call, nullptr, device, reinterpret_cast<void*>(stream)));
      },
      py::arg("device"), py::arg("stream"),
      "Launches on a CUDA device, in one of its streams. The tensors must outlive the work.");
  bind(
      names.emulate,
      [runs](py::handle self, int blocks, unsigned seed) {
        const void* call = read_self(runs, self);
        const py::gil_scoped_release release;
        raise_if(runs.emulate(call, nullptr, blocks, seed));
      },
      py::arg("blocks"), py::arg("seed"),
      "Runs the kernels' source on the CPU: so many blocks, in the schedule of this seed.");
  bind(
      names.step,
      [runs](py::handle self) { return Step{runs.copied(read_self(runs, self)), runs}; },
      "This call in a Program: its addresses are slots of it, see csrc/bind/program.h.");
}

}  // namespace vsa::bind
