// Stored 16-bit types as distinct C++ types, so that a load picks its conversion by overload.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
