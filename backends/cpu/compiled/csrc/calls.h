// Calls whose arguments lie in memory, so that many are made without Python between them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

typedef int64_t (*Packed)(const int64_t* arguments);

// A pointer, an integer, or a float in the low half.
template <typename T>
T unpacked(int64_t value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else if constexpr (std::is_same_v<T, float>) {
    uint32_t low = uint32_t(value);
    float x;
    memcpy(&x, &low, sizeof x);
    return x;
  } else {
    return value;
  }
}

template <typename R, typename... A, size_t... I>
int64_t spread(R (*function)(A...), const int64_t* arguments, std::index_sequence<I...>) {
  if constexpr (std::is_void_v<R>)
    return function(unpacked<A>(arguments[I])...), 0;
  else
    return function(unpacked<A>(arguments[I])...);
}

template <typename R, typename... A>
int64_t call(R (*function)(A...), const int64_t* arguments) {
  return spread(function, arguments, std::index_sequence_for<A...>{});
}

#define PACKED(name) \
  extern "C" int64_t name##_packed(const int64_t* arguments) { return call(name, arguments); }
