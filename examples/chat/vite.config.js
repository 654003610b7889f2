import { defineConfig } from "vite";

export default defineConfig({
  build: { outDir: "pb_public", emptyOutDir: true },
  // while you work on it, with Herald running beside it
  server: { proxy: { "/api": "http://127.0.0.1:8090" } },
});
