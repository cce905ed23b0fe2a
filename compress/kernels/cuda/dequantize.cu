// Weights of rows `first` to `last` (0 to O) as bfloat16: table entry times scale, rounded once, as torch does it.
//
// A lane takes eight columns of four rows: codes are read and weights written in whole lines of 128 bytes.

template <int BITS, int SCALE_BITS>
__global__ void __launch_bounds__(256) dequantize(const Matrix m, u16* __restrict__ out, int first, int last, int block_size) {
  __shared__ float entries[(1 << BITS) * 32];  // a copy for every lane
  constexpr int WORDS = BITS == 4 || BITS == 2 ? 1 : 2;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, q = lane >> 3, t = lane & 3;
  int tile = first / 16 + blockIdx.y, chunk = (blockIdx.x * 8 + warp) * 2 + ((lane >> 2) & 1), column = chunk * 32 + 8 * t;
  bool there = chunk < m.chunks && column < m.columns;
  uint4 words[WORDS];
  u32 codes = 0;
  float steps[4];
  if (there) {
    const u32* base = m.codes + ((size_t)tile * m.chunks + chunk) * (BITS * 16) + 4 * q;
    auto read = [](const u32* at) {
      uint4 v;
      asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(at));
      return v;
    };
    words[0] = read(base + (BITS == 4 ? t * 16 : BITS == 8 ? t * 32 : (t >> 1) * 16));
    if (BITS == 8) words[WORDS - 1] = read(base + t * 32 + 16);
    if (BITS == 3) words[WORDS - 1] = read(base + 32);
    int block = column / block_size, row = tile * 16 + 4 * q;
    const u8* scales = m.scale_codes + ((size_t)tile * m.blocks + block) * (2 * SCALE_BITS);
    codes = two_scale_codes<SCALE_BITS>(scales, 2 * q) | (two_scale_codes<SCALE_BITS>(scales, 2 * q + 1) << 16);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      steps[i] = row + i < m.rows ? __ldg(m.steps + (((row + i) * m.blocks + block) >> m.shift)) : 0.f;
  }
  float offset = __ldg(m.offset);
  for (int entry = warp; entry < (1 << BITS); entry += 8) entries[entry * 32 + lane] = __ldg(m.table + entry);
  __syncthreads();
  if (!there) return;
  const u32* low = reinterpret_cast<const u32*>(&words[0]);
  const u32* high = reinterpret_cast<const u32*>(&words[WORDS - 1]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int row = tile * 16 + 4 * q + i;
    if (row < first || row >= last) continue;
    float scale = __fadd_rn(offset, __fmul_rn((float)((codes >> (8 * i)) & 255), steps[i]));
    auto weight = [&](u32 code) { return __fmul_rn(entries[code * 32 + lane], scale); };
    u32 pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (BITS == 8) {
        u32 two = (j < 2 ? low[i] : high[i]) >> (16 * (j & 1));
        pairs[j] = bf16_pair(weight(two & 255), weight((two >> 8) & 255));
      } else {
        u32 two = nibbles<BITS>(low[i], high[i], t) >> (8 * j);
        pairs[j] = bf16_pair(weight(two & 15), weight((two >> 4) & 15));
      }
    }
    uint4 line = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    *reinterpret_cast<uint4*>(out + (size_t)(row - first) * m.columns + column) = line;
  }
}
