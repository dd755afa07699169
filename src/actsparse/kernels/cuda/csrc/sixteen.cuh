// A warp's products of 16-bit matrices on tensor cores.
#ifndef ACTSPARSE_EMULATE
// Four 8 by 8 matrices; lane 8 m + r says where row r of matrix m lies, lane 4 g + c gets values 2 c and 2 c + 1 of row g ...
AS_DEVICE void load_matrices(u32 (&to)[4], const u16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"((u32)__cvta_generic_to_shared(row))
               : "memory");
}
// ... or of column g.
AS_DEVICE void load_transposed(u32 (&to)[4], const u16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"((u32)__cvta_generic_to_shared(row))
               : "memory");
}
// From rows to columns of one such matrix.
AS_DEVICE u32 transposed(u32 pair) {
  u32 v;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(pair));
  return v;
}
// sum [16, 8] += a [16, 16] b [16, 8]: a's matrices are rows 0 to 7 and 8 to 15 of columns 0 to 7, then of 8 to 15; b's, by
// columns, rows 0 to 7 and 8 to 15.  A lane holds sum[g, 2 c], [g, 2 c + 1], and those of g + 8.
AS_DEVICE void multiply_sixteen(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if AS_DTYPE == 1
#define AS_KIND "bf16"
#else
#define AS_KIND "f16"
#endif
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." AS_KIND "." AS_KIND
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#undef AS_KIND
}
AS_DEVICE float4 load_others(const float* from) {  // what another block has just written: from L2
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from));
  return v;
}
#endif
