// SPDX-License-Identifier: Apache-2.0
// A call of vsa._C: a struct of launch/ whose fields Python gives by keyword, each exactly once.
//
// One table per call says which fields those are. The constructor, its errors, FIELDS and with it
// the stub vsa/_C.pyi come from that table.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind/arguments.h"
#include "bind/program.h"

namespace vsa::bind {

// What a field demands of its value: must(), for the sentence, and holds(value).
struct Anything {
  static std::string must() { return ""; }
  static bool holds(const auto&) { return true; }
};
struct Positive {
  static std::string must() { return "be positive"; }
  static bool holds(int64_t x) { return x > 0; }
};
struct AllPositive {
  static std::string must() { return "be positive numbers"; }
  static bool holds(const std::vector<int>& xs) {
    for (int x : xs)
      if (x <= 0) return false;
    return true;
  }
};
struct NotNegative {
  static std::string must() { return "not be negative"; }
  static bool holds(int64_t x) { return x >= 0; }
};
struct Share {
  static std::string must() { return "be in [0, 1]"; }
  static bool holds(double x) { return x >= 0 && x <= 1; }
};
struct NotNull {
  static std::string must() { return "not be a null address"; }
  static bool holds(const void* x) { return x != nullptr; }
  static bool holds(const launch::TokenView& x) { return holds(x.data); }
  static bool holds(const launch::MatrixView& x) { return holds(x.data); }
  static bool holds(const launch::SequenceView& x) { return holds(x.video); }
};

// One of the values that kernels are compiled for.
template <class Values>
struct OneOf;
template <auto... values>
struct OneOf<launch::Values<values...>> {
  static py::tuple all() { return py::make_tuple(written(values)...); }
  static std::string must() { return "be one of " + py::str(all()).cast<std::string>(); }
  static bool holds(auto x) { return ((x == values) || ...); }

 private:
  static int written(int x) { return x; }
  static const char* written(launch::Dtype x) { return name_of(x); }
};

template <class Call>
struct Field {
  const char* name;
  std::string type;
  void (*set)(Call&, py::handle, const std::string& full_name);
  void (*link)(Call&, const Slots&);  // gives a prepared call the addresses of a run
};

[[noreturn]] inline void refuse_type(py::handle x, const std::string& name, std::string allowed) {
  for (const Alias& alias : kAliases)
    if (allowed == alias.name) allowed = std::string(alias.definition) + " (" + alias.meaning + ")";
  const std::string given = py::str(py::type::handle_of(x).attr("__name__"));
  throw py::type_error(name + " must be " + allowed + ", but it is of type " + given);
}

// Reads a value of type T into `to`, or throws a sentence that begins with the field's name.
template <class Check, class T>
void read_field(T& to, py::handle x, const std::string& name) {
  try {
    to = Python<T>::read(x, name);
  } catch (const py::cast_error&) {
    refuse_type(x, name, Python<T>::type());
  } catch (const py::reference_cast_error&) {  // None for an object
    refuse_type(x, name, Python<T>::type());
  }
  if (!Check::holds(to))
    throw py::value_error(name + " must " + Check::must() + ", but it is " +
                          std::string(py::repr(x)));
}

template <auto member>
struct Member;
template <class Owner, class T, T Owner::* member>
struct Member<member> {
  using Type = T;
};

template <class Call, auto member, class Check = Anything>
Field<Call> field(const char* name) {
  using T = typename Member<member>::Type;
  return {name, Python<T>::type(),
          [](Call& call, py::handle x, const std::string& full_name) {
            read_field<Check>(call.*member, x, full_name);
          },
          [](Call& call, const Slots& slots) { link(call.*member, slots); }};
}
#define VSA_FIELD(Call, member, ...) \
  ::vsa::bind::field<Call, &Call::member __VA_OPT__(, ) __VA_ARGS__>(#member)

// What a call inherits, given as one object of the class that is bound to it.
template <class Call, class Base>
Field<Call> inherited(const char* name) {
  return {name, Python<Base>::type(),
          [](Call& call, py::handle x, const std::string& full_name) {
            read_field<Anything>(static_cast<Base&>(call), x, full_name);
          },
          [](Call& call, const Slots& slots) { link(static_cast<Base&>(call), slots); }};
}

// The fields in the order of the table, with the strings that keywords are looked up by.
template <class Call>
class Table {
 public:
  Table(const char* owner, std::vector<Field<Call>> fields) : owner_(owner) {
    for (Field<Call>& field : fields) {
      PyObject* key = PyUnicode_InternFromString(field.name);  // as long as the process lives
      if (key == nullptr) throw py::error_already_set();
      rows_.push_back({key, std::string(owner) + ": " + field.name, std::move(field)});
    }
  }

  Call call(const py::kwargs& given) const {
    Call call{};
    for (const Row& row : rows_) {
      PyObject* value = PyDict_GetItemWithError(given.ptr(), row.key);
      if (value == nullptr) throw py::type_error(row.full_name + " is missing");
      row.field.set(call, value, row.full_name);
    }
    if (given.size() != rows_.size()) refuse_unknown(given);
    return call;
  }

  py::dict types() const {
    py::dict types;
    for (const Row& row : rows_) types[row.field.name] = row.field.type;
    return types;
  }

 private:
  struct Row {
    PyObject* key;
    std::string full_name;
    Field<Call> field;
  };

  [[noreturn]] void refuse_unknown(const py::kwargs& given) const {
    const py::dict known = types();
    for (const auto& [name, value] : given)
      if (!known.contains(name))
        throw py::type_error(owner_ + " has no field " + std::string(py::str(name)) +
                             ", its fields are " +
                             std::string(py::str(", ").attr("join")(known).cast<std::string>()));
    throw std::logic_error(owner_ + ": a field stands twice in its table");
  }

  std::string owner_;
  std::vector<Row> rows_;
};

// The class of a call, Python's FIELDS: names and types of its keywords.
template <class Call>
py::class_<Call> bind_struct(py::module_& m,
                             const char* name,
                             const char* doc,
                             std::vector<Field<Call>> fields) {
  links<Call>().clear();
  for (const Field<Call>& field : fields) links<Call>().push_back(field.link);
  const Table<Call> table(name, std::move(fields));
  py::class_<Call> bound(m, name, doc);
  bound.def(py::init([table](const py::kwargs& given) { return table.call(given); }));
  bound.attr("FIELDS") = table.types();
  return bound;
}

inline void raise_if(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("vsa: " + error);
}

template <auto on_cpu, class Call>
std::string emulated(const Call& call, int blocks, unsigned seed) {
  if constexpr (std::is_invocable_v<decltype(on_cpu), const Call&>)
    return on_cpu(call);
  else
    return on_cpu(call, blocks, seed);
}

// Three methods: the kernels on a GPU, the same kernels on the CPU, and either in a Program.
// Kernels without matrix products need no emulator, and ignore blocks and seed.
template <auto on_gpu, auto on_cpu, class Call>
void bind_run(py::class_<Call>& bound,
              const char* launch = "launch",
              const char* emulate = "emulate",
              const char* step = "step") {
  bound.def(
      launch,
      [](const Call& call, int device, uintptr_t stream) {
        raise_if(on_gpu(call, device, reinterpret_cast<void*>(stream)));
      },
      py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
      "Launches on a CUDA device, in one of its streams. The tensors must outlive the work.");
  bound.def(
      emulate,
      [](const Call& call, int blocks, unsigned seed) {
        raise_if(emulated<on_cpu>(call, blocks, seed));
      },
      py::arg("blocks"), py::arg("seed"), py::call_guard<py::gil_scoped_release>(),
      "Runs the kernels' source on the CPU: so many blocks, in the schedule of this seed.");
  bound.def(
      step,
      [](const Call& prepared) {
        return Step{[prepared](const Slots& slots, int device, void* stream) {
                      return on_gpu(linked(prepared, slots), device, stream);
                    },
                    [prepared](const Slots& slots, int blocks, unsigned seed) {
                      return emulated<on_cpu>(linked(prepared, slots), blocks, seed);
                    }};
      },
      "This call in a Program: its addresses are slots of it, see csrc/bind/program.h.");
}

void bind_fine(py::module_& m);
void bind_coarse_select(py::module_& m);
void bind_float_product(py::module_& m);
void bind_tail(py::module_& m);
void bind_sub_blocks(py::module_& m);
void bind_low_precision(py::module_& m);
void bind_masked_coarse(py::module_& m);
void bind_chunks(py::module_& m);
void bind_padded(py::module_& m);

}  // namespace vsa::bind
